"""Representation bias: how far a representation is from the expert's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .subject import EXPERT, Subject


def bias(own: Tensor, expert: Tensor) -> float:
    """Mean L1: (1 / (N k)) sum_n || z_n - z*_n ||_1.

    The distance of Representation Surgery (arXiv 2402.02705), whose image features the paper's
    distillation loss (eq 3.2) brings together.

    Args:
        own: z, (..., N, k).
        expert: z*, of the same images, in z's shape.
    """
    return float((own - expert).abs().mean())


def measure(subject: Subject) -> dict[str, Any]:
    """Bias along the encoder.

    Returns:
        Encoder -> ``blocks``: of the class token at each block's output, a value a block;
        ``features``: of the image features.
    """
    expert = subject.trace(EXPERT)
    found = {}
    for name in subject.compared:
        own = subject.trace(name)
        found[name] = {
            "blocks": [bias(a, b) for a, b in zip(own.blocks, expert.blocks, strict=True)],
            "features": bias(own.features, expert.features),
        }
    return found
