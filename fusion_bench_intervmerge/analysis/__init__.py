"""How far a repaired encoder is from the experts, and which edit brings it there.

One file an analysis: its name is the file's name, and its ``measure`` takes a ``Subject`` (one task
seen by several encoders) and gives, for each encoder, a value made of JSON values. To add an
analysis, put a module with a ``measure`` beside these; nothing else changes.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..settings import shown
from .subject import EXPERT, MERGED, Subject

log = logging.getLogger(__name__)

ANALYSES: tuple[str, ...] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "subject")
)


def read_analyses(names: str | Sequence[str] | None, where: str = "analyses") -> list[str]:
    """The analyses that a setting names: null, ``all`` or a list.

    Raises:
        ConfigError: an analysis that does not exist.
    """
    if names is None:
        return []
    chosen = list(ANALYSES) if names == "all" else [names] if isinstance(names, str) else names
    allowed = f"null, all, or a list of {', '.join(ANALYSES)}"
    if not isinstance(chosen, (list, tuple)):
        raise ConfigError(where, shown(names), allowed)
    for name in chosen:
        if name not in ANALYSES:
            raise ConfigError(where, f"there is no analysis {name!r}", allowed)
    return list(chosen)


def analyse(subject: Subject, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure one task.

    Args:
        subject: the task and its encoders.
        names: of ``ANALYSES``.

    Returns:
        Analysis -> encoder -> value. An analysis that needs what the subject lacks (labels, a
        zero-shot head) is left out.
    """
    log.info("analysing %s: %s", subject.task, ", ".join(names))
    found = {}
    for name in names:
        value = importlib.import_module(f"{__name__}.{name}").measure(subject)
        if value:
            found[name] = value
    return found


__all__ = ["ANALYSES", "EXPERT", "MERGED", "Subject", "analyse", "read_analyses"]
