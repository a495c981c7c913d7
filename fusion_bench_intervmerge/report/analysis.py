"""What ``analysis.json`` holds, checked: merge -> analysis -> task -> encoder -> value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError

Tasks = Mapping[str, Mapping[str, Any]]  # task -> encoder -> value
Analysis = Mapping[str, Tasks]


def read_analysis(found: Mapping[str, Any], path: Path) -> dict[str, Analysis]:
    """The merges' analyses of a file's content; analyses that are not known here are kept.

    Args:
        found: the content.
        path: the file, for errors.

    Raises:
        ConfigError: it is laid out in another way.
    """
    try:
        merges = dict(found["merges"])
        for analyses in merges.values():
            for name, tasks in analyses.items():
                if len({tuple(encoders) for encoders in tasks.values()}) != 1:
                    raise ValueError(f"{name}: the tasks' encoders differ")
                _CHECKS.get(name, _unknown)(tasks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        layout = "merges: {MERGE: {ANALYSIS: {TASK: {ENCODER: value}}}}"
        raise ConfigError(str(path), f"is not laid out as expected ({reason})", layout) from None
    return merges


def over_tasks(tasks: Tasks, encoder: str, read: Callable[[Any], Any]) -> np.ndarray:
    """One encoder's values, the tasks stacked: (tasks, ...)."""
    return np.array([read(encoders[encoder]) for encoders in tasks.values()], float)


def in_all(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that every value has: of some tasks there are no labels, or no class names."""
    return [key for key in values[0] if all(key in value for value in values)]


def _agreement(tasks: Tasks) -> None:
    _numbers([list(encoders.values()) for encoders in tasks.values()], 2)


def _bias(tasks: Tasks) -> None:
    _numbers([[v["blocks"] for v in encoders.values()] for encoders in tasks.values()], 3)
    _numbers([[v["features"] for v in encoders.values()] for encoders in tasks.values()], 2)


def _stitching(tasks: Tasks) -> None:
    every = [value for encoders in tasks.values() for value in encoders.values()]
    for key in in_all(every):
        _numbers([value[key] for value in every], 2)


def _embeddings(tasks: Tasks) -> None:
    for encoders in tasks.values():
        for kind in ("pca", "tsne"):
            if _numbers([value[kind] for value in encoders.values()], 3).shape[2] != 2:
                raise ValueError("embeddings: a point has two coordinates")
        if "expert" not in encoders:
            raise ValueError("embeddings: the expert is missing")


def _contributions(tasks: Tasks) -> None:
    for encoder in next(iter(tasks.values())):
        edits = [encoders[encoder] for encoders in tasks.values()]
        if any([_place(e) for e in own] != [_place(e) for e in edits[0]] for own in edits):
            raise ValueError("contributions: the tasks' edits differ")
        keys = [
            key for key in in_all([e for own in edits for e in own]) if key not in ("site", "block")
        ]
        _numbers([[[edit[key] for key in keys] for edit in own] for own in edits], 3)


def _place(edit: Mapping[str, Any]) -> tuple[Any, Any]:
    return edit["site"], edit["block"]


def _unknown(tasks: Tasks) -> None:
    """A plugin's analysis: nothing is drawn of it, and nothing is asked of it."""


def _numbers(values: Any, dimensions: int) -> np.ndarray:
    array = np.array(values, float)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ValueError("numbers are missing or not finite")
    return array


_CHECKS: dict[str, Callable[[Tasks], None]] = {
    "agreement": _agreement,
    "bias": _bias,
    "contributions": _contributions,
    "embeddings": _embeddings,
    "stitching": _stitching,
}
