"""Which names are folders, and which are models on a hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import ArtifactError


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/model``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def local_folder(name: str | Path, **options: Any) -> Path:
    """The folder of that name; if there is none, it is an id of the hub, and fetched from there.

    Options are those of ``huggingface_hub.snapshot_download``.

    Raises:
        ArtifactError: the hub has no such model, or is not reached.
    """
    if isinstance(name, Path) or Path(name).exists() or not is_hub_id(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    with hub_errors(f"{name}: there is no such folder, and it is not found on the hub"):
        # Exported graphs lie beside the model, and can be as large.
        return Path(snapshot_download(name, ignore_patterns=["onnx/*"], **options))


@contextmanager
def hub_errors(problem: str) -> Iterator[None]:
    """Raise the errors of the hub's library as an ``ArtifactError`` of one line."""
    try:
        yield
    except (OSError, ValueError) as error:  # HTTP errors, no connection, no such file or id
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ArtifactError(f"{problem} ({reason[:200]})") from None
