"""How far a repaired encoder is from the experts, and which edit brings it there.

An analysis takes ``TaskEncoders``, one task seen by several encoders, and returns a value made of
JSON values for each encoder. To add one, write it beside these and name it in ``ANALYSES``. The
report draws a number per encoder as it is; other values need a function in
``report.figures.analyses``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import ConfigError, shown
from . import agreement, bias, contributions, embeddings, stitching
from .base import EXPERT, MERGED, TaskEncoders

log = logging.getLogger(__name__)

ANALYSES: dict[str, Callable[[TaskEncoders], Mapping[str, Any]]] = {
    "agreement": agreement.measure,
    "bias": bias.measure,
    "contributions": contributions.measure,
    "embeddings": embeddings.measure,
    "stitching": stitching.measure,
}


def read_analyses(names: str | Sequence[str] | None, where: str = "analyses") -> list[str]:
    """Parse the setting of analyses: null, ``all`` or a list.

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


def analyse(encoders: TaskEncoders, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Measure one task.

    Args:
        encoders: the task and its encoders.
        names: of ``ANALYSES``.

    Returns:
        Analysis -> encoder -> value. An analysis that needs what is missing (labels, a zero-shot
        head) is left out.
    """
    log.info("analysing %s: %s", encoders.task, ", ".join(names))
    values = {name: ANALYSES[name](encoders) for name in names}
    return {name: value for name, value in values.items() if value}


__all__ = ["ANALYSES", "EXPERT", "MERGED", "TaskEncoders", "analyse", "read_analyses"]
