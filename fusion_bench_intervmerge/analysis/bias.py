"""Representation bias: how far a representation is from the expert's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import EXPERT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..report.style import Canvas
    from .base import TaskEncoders

PLACE = 10
_DISTANCE = "distance of image features"


def bias(own: Tensor, expert: Tensor) -> float:
    """Mean L1: (1 / (N k)) sum_n || z_n - z*_n ||_1.

    The distance of Representation Surgery (arXiv 2402.02705), whose image features the paper's
    distillation loss (eq 3.2) brings together.

    Args:
        own: z, (..., N, k).
        expert: z*, of the same images, in z's shape.
    """
    return float((own - expert).abs().mean())


def measure(encoders: TaskEncoders) -> dict[str, Any]:
    """Bias along the encoder.

    Returns:
        Encoder -> ``blocks``: of the class token at each block's output, a value a block;
        ``features``: of the image features.
    """
    expert = encoders.trace(EXPERT)
    found = {}
    for name in encoders.compared:
        own = encoders.trace(name)
        found[name] = {
            "blocks": [bias(a, b) for a, b in zip(own.blocks, expert.blocks, strict=True)],
            "features": bias(own.features, expert.features),
        }
    return found


def figures(found: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """How close image features are, beside the predictions' agreement, and the class token."""
    tasks = found["bias"]
    features = {t: {e: v["features"] for e, v in of.items()} for t, of in tasks.items()}
    kinds = {_DISTANCE: pd.DataFrame(features).T}
    agreement = found.get("agreement")
    if agreement is not None and list(agreement) == list(features):  # else class names are missing
        kinds["predictions equal to the expert's"] = 100 * pd.DataFrame(agreement).T
    yield (
        "closeness",
        "How close to the experts",
        "The mean absolute difference of image features to the expert's"
        + (", and how often the predicted class is the expert's." if len(kinds) > 1 else "."),
        partial(_closeness, kinds),
    )
    blocks = {e: np.array([of[e]["blocks"] for of in tasks.values()]) for e in kinds[_DISTANCE]}
    yield (
        "bias_by_block",
        "Bias along the blocks",
        "The mean absolute difference of the class token to the expert's after each block.",
        lambda canvas: canvas.curves(list(tasks), blocks, 1, "block", "distance to the expert"),
    )


def _closeness(kinds: Mapping[str, pd.DataFrame], canvas: Canvas) -> Figure:
    shown = {title: pd.concat([of, of.mean().to_frame("mean").T]) for title, of in kinds.items()}
    encoders = list(next(iter(shown.values())))
    tasks = list(next(iter(shown.values())).index)
    high = max(0.27, 0.075 * len(encoders)) * len(tasks) + 0.6
    panels = canvas.panels(len(kinds), high, 0.35, columns=(1, 2))
    y = panels.rows(tasks, bold_last=True)
    for (title, values), panel in zip(shown.items(), panels.axes, strict=True):
        panels.ranges(panel, y, values.min(axis=1), values.max(axis=1))
        for name in encoders:
            panel.plot(values[name], y, **canvas.palette[name].point, zorder=2 + (name != "merged"))
        panels.title(panel, title)
        if title.startswith("predictions"):
            panels.percent(panel.xaxis)
    panels.legend([canvas.palette[name].handle() for name in encoders])
    return panels.finish()
