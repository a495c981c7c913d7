"""Files and folders that appear whole or not at all, also while others read or write them.

What is being written is in a hidden folder beside its place, locked by the process that writes it.
The lock ends with the process, so the next one that writes there can tell what a killed process
left behind, and removes it. Modes are the umask's.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .config import ConfigError

# == files
# Files and folders that appear whole or not at all, also while others read or write them.
#
# What is being written is in a hidden folder beside its place, locked by the process that writes it.
# The lock ends with the process, so the next one that writes there can tell what a killed process
# left behind, and removes it. Modes are the umask's.
#
try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing that was left behind is removed
    fcntl = None  # type: ignore[assignment]

PREFIX = ".writing-"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    with _temporary_folder(path) as folder:
        yield folder / path.name
        _finish(folder)
        os.replace(folder / path.name, path)


@contextmanager
def whole_folder(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A temporary folder beside ``path`` that replaces it when the block ends well.

    On Linux the two change places in one step, so that at no time there is none.

    Args:
        path: its place; a link is followed.
        check: called just before the change; it raises when what is there must stay.

    Raises:
        ConfigError: the parent folder cannot be written to.
    """
    path = Path(os.path.realpath(path))
    with _temporary_folder(path) as folder:
        yield folder
        _finish(folder)
        with _locked(path.parent):
            if check is not None:
                check()
            if not path.exists():
                os.rename(folder, path)
            elif not _exchange(folder, path):
                retired = folder.with_name(folder.name + "-old")
                os.rename(path, retired)
                os.rename(folder, path)
                os.rename(retired, folder)


@contextmanager
def opened_folder(path: Path) -> Iterator[Path]:
    """A folder to read several files from: on Linux all from the same one, whatever replaces it.

    Raises:
        OSError: it is missing, no folder, or not readable.
    """
    if fcntl is None:
        yield path
        return
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(handle, fcntl.LOCK_SH)  # whoever replaces it will not remove it yet
            if not os.path.samestat(os.fstat(handle), os.stat(path)):
                continue  # replaced before it was locked
            held = Path(f"/proc/self/fd/{handle}")
            yield held if held.is_dir() else path
            return
        finally:
            os.close(handle)


def write_files(folder: Path, content: Mapping[str, str | bytes]) -> None:
    """Write files by name, each whole or not at all."""
    for name, value in content.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(value if isinstance(value, bytes) else value.encode())


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all."""
    write_files(path.parent, {path.name: json.dumps(value, indent=indent) + "\n"})


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, locked, and gone afterwards."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f"{PREFIX}*"):
            _remove(abandoned, mine=False)
        folder, handle = _new_folder(path.parent)
        try:
            yield folder
        finally:
            if handle is not None:
                os.close(handle)
            _remove(folder, mine=True)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise ConfigError(str(path), problem, "a writable folder") from None


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = parent / f"{PREFIX}{secrets.token_hex(6)}"
        folder.mkdir()
        if fcntl is None:
            return folder, None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        _lock(handle, fcntl.LOCK_EX)
        if folder.exists():
            return folder, handle
        os.close(handle)


def _remove(folder: Path, mine: bool) -> None:
    """Remove a temporary folder, or leave it to a later call while another process uses it."""
    try:
        with _locked(folder, wait=False) as locked:
            if locked or mine:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # gone, or in use


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock; gives whether there are locks.

    Raises:
        BlockingIOError: another process has it, and ``wait`` is false.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Lock an opened folder until it is closed; false where the file system has no locks."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _finish(folder: Path) -> None:
    """Bring a folder's files to the disk, with the modes that the umask gave the folder."""
    mode = folder.stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode & 0o666)  # safetensors writes files for their owner alone
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change places in one step; False where the system has no such step."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# == cache
# Where this package keeps what it builds once and reads many times.
CACHE_VARIABLE = "FUSION_BENCH_INTERVMERGE_CACHE"


def cache_root() -> Path:
    """The cache folder: ``$FUSION_BENCH_INTERVMERGE_CACHE``, else the user's own cache folder.

    Returns:
        An absolute path; the folder itself is made by whoever writes into it.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "fusion-bench-intervmerge"
