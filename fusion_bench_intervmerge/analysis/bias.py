"""Representation bias: how far a representation is from the expert's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from ..config import Json
from . import EXPERT, Drawing, Found

if TYPE_CHECKING:
    from torch import Tensor

    from .base import TaskEncoders

PLACE = 10
_AGREEMENT = "predictions equal to the expert's"


def bias(own: Tensor, expert: Tensor) -> float:
    """Mean L1: (1 / (N k)) sum_n || z_n - z*_n ||_1.

    The distance of Representation Surgery (arXiv 2402.02705), whose image features the paper's
    distillation loss (eq 3.2) brings together.

    Args:
        own: z, (..., N, k).
        expert: z*, of the same images, in z's shape.
    """
    return float((own - expert).abs().mean())


def measure(encoders: TaskEncoders) -> dict[str, Json]:
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


def figures(found: Found) -> Iterator[Drawing]:
    """How close image features are, beside the predictions' agreement, and the class token."""
    tasks, agreement = found["bias"], found.get("agreement")
    features = {task: {e: v["features"] for e, v in of.items()} for task, of in tasks.items()}
    shown = {"distance of image features": pd.DataFrame(features).T}
    if agreement is not None and list(agreement) == list(tasks):  # else class names are missing
        shown[_AGREEMENT] = 100 * pd.DataFrame(agreement).T
    for values in shown.values():
        values.loc["mean"] = values.mean()
    blocks = {e: pd.DataFrame({t: of[e]["blocks"] for t, of in tasks.items()}) for e in values}
    blocks = {encoder: values.set_axis(values.index + 1) for encoder, values in blocks.items()}
    yield (
        "closeness",
        "How close to the experts",
        "The mean absolute difference of image features to the expert's"
        + (", and how often the predicted class is the expert's." if len(shown) > 1 else "."),
        lambda canvas: canvas.dots(shown, percent=[_AGREEMENT]),
    )
    yield (
        "bias_by_block",
        "Bias along the blocks",
        "The mean absolute difference of the class token to the expert's after each block.",
        lambda canvas: canvas.curves(blocks, "block", "distance to the expert"),
    )
