"""What may name a task.

The name is a file's in an artifact, on whatever file system, an entry of FusionBench's report and
a torch module's. So it is made of letters and digits of any script, ``_``, ``-`` and inner spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from torch import nn

from .errors import ConfigError

LONGEST = 128  # bytes in UTF-8; with an ending it has to fit into the 255 of most file systems
ALLOWED = f"letters, digits, '_', '-' and inner spaces, a letter or digit first, {LONGEST} bytes"

# "auto" will ask a router; the others are entries of FusionBench's report beside the tasks'.
_TAKEN = {"auto", "average", "model_info"}
_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)\d")  # Windows' own, whatever the ending


def check_task_name(name: object, others: Iterable[str] = (), where: str = "tasks") -> None:
    """Raise unless a task may have that name.

    Args:
        name: to check.
        others: names of the tasks beside it.
        where: config key to name in errors.

    Raises:
        ConfigError: what is wrong with it, in one line.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(where, f"{name!r} cannot name a task", ALLOWED)
    shown = ascii(name[:40]) if not name.isprintable() else repr(name[:40])
    if not _is_plain(name):
        raise ConfigError(where, f"{shown} cannot name a task", ALLOWED)
    if len(name.encode()) > LONGEST:
        raise ConfigError(where, f"{shown}... is too long to name a task", ALLOWED)
    if name in _TAKEN or _DEVICES.fullmatch(name.lower()) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(where, f"{shown} cannot name a task: it is a reserved word", ALLOWED)
    for other in others:
        if other == name:
            raise ConfigError(where, f"{shown} is there already", "a new name")
        if _folded(other) == _folded(name):
            raise ConfigError(
                where, f"{shown} and {other!r} would share a file on some systems", "other names"
            )


def _is_plain(name: str) -> bool:
    # L: letters, M: marks that belong to a letter, N: digits
    kinds = [unicodedata.category(character)[0] for character in name]
    inner = all(k in "LMN" or c in "_- " for k, c in zip(kinds, name, strict=True))
    return inner and kinds[0] in "LN" and name[-1] != " "


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
