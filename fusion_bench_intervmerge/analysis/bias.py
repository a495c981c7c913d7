"""Representation bias: how far a representation is from the expert's."""

from __future__ import annotations

from torch import Tensor

from ..config import Json
from .base import EXPERT, TaskEncoders


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
        Encoder -> ``blocks``: of the class token at each block's output, one value per block;
        ``features``: of the image features.
    """
    expert = encoders.trace(EXPERT)
    values = {}
    for name in encoders.compared:
        own = encoders.trace(name)
        values[name] = {
            "blocks": [bias(a, b) for a, b in zip(own.blocks, expert.blocks, strict=True)],
            "features": bias(own.features, expert.features),
        }
    return values
