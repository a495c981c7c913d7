"""How far a repaired encoder is from the experts, and which edit brings it there.

One file an analysis: its name is the file's name, and its ``measure`` takes ``TaskEncoders`` (one
task seen by several encoders) and gives, for each encoder, a value made of JSON values. Its figures
are in the same file: ``figures`` takes what all analyses of a merge found, analysis -> task ->
encoder -> value, and gives the name, title, text and drawing function of each. To add an analysis,
put a module beside these; nothing else changes.

Reports draw these figures where no torch is installed: it is imported where something is measured.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..config import ConfigError, shown
from ..registry import names_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..report.style import Canvas
    from .base import TaskEncoders

log = logging.getLogger(__name__)

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # analysis -> task -> encoder -> value
# name, title, text and the function that draws it
Drawing: TypeAlias = "tuple[str, str, str, Callable[[Canvas], Figure]]"
EXPERT, MERGED = "expert", "merged"
ANALYSES = names_in(__path__)


def modules() -> dict[str, ModuleType]:
    """The analyses by name, in the order of their ``PLACE``, which that of their figures is."""
    found = {name: importlib.import_module(f"{__name__}.{name}") for name in ANALYSES}
    return dict(sorted(found.items(), key=lambda item: getattr(item[1], "PLACE", 99)))


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


def analyse(encoders: TaskEncoders, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure one task.

    Args:
        encoders: the task and its encoders.
        names: of ``ANALYSES``.

    Returns:
        Analysis -> encoder -> value. An analysis that needs what is not there (labels, a zero-shot
        head) is left out.
    """
    log.info("analysing %s: %s", encoders.task, ", ".join(names))
    found = {name: modules()[name].measure(encoders) for name in names}
    return {name: value for name, value in found.items() if value}


__all__ = ["ANALYSES", "EXPERT", "MERGED", "analyse", "modules", "read_analyses"]
