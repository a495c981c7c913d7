"""Files and folders that appear whole or not at all, and the cache folder.

What is being written is in a hidden folder beside its place, and is renamed when it is complete. A
process that was killed leaves that folder behind; a later write removes it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from .config import ConfigError

PREFIX = ".writing-"
ABANDONED = 3600  # seconds; no write takes that long
CACHE_VARIABLE = "FUSION_BENCH_INTERVMERGE_CACHE"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name if the block ends well.

    Raises:
        ConfigError: the folder cannot be written to, or the disk is full.
    """
    with _folder_beside(path) as folder:
        yield folder / path.name
        _finish(folder)
        os.replace(folder / path.name, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that replaces it if the block ends well.

    A link is followed.

    Raises:
        ConfigError: the parent folder cannot be written to, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    with _folder_beside(path) as folder:
        yield folder
        _finish(folder)
        old = folder.with_name("old")
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(folder, path)
        except OSError:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A new folder in a hidden one beside ``path``, both gone afterwards."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for hidden in path.parent.glob(f"{PREFIX}*"):
            with suppress(OSError):  # another process removed it
                if hidden.stat().st_mtime < time.time() - ABANDONED:
                    shutil.rmtree(hidden, ignore_errors=True)
        with TemporaryDirectory(
            prefix=PREFIX, dir=path.parent, ignore_cleanup_errors=True
        ) as hidden_name:
            folder = Path(hidden_name) / "new"
            folder.mkdir()
            yield folder
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise ConfigError(str(path), problem, "a writable folder") from None


def _finish(folder: Path) -> None:
    """Bring a folder's files to the disk, with the modes that the umask gave the folder."""
    mode = folder.stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode & 0o666)  # safetensors writes files for their owner alone
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def write_files(folder: Path, content: Mapping[str, str | bytes]) -> None:
    """Write files by name, each whole or not at all."""
    for name, value in content.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(value if isinstance(value, bytes) else value.encode())


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all."""
    write_files(path.parent, {path.name: json.dumps(value, indent=indent) + "\n"})


def cache_root() -> Path:
    """The cache folder: ``$FUSION_BENCH_INTERVMERGE_CACHE``, else the user's own cache folder.

    Returns:
        An absolute path; the folder itself is made by whoever writes into it.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "fusion-bench-intervmerge"
