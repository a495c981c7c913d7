"""Agreement with the expert's predictions, which needs no labels."""

from __future__ import annotations

from .base import TaskEncoders


def measure(encoders: TaskEncoders) -> dict[str, float]:
    """Share of images on which argmax logits(f) = argmax logits(f*), with the expert's f*.

    Returns:
        Encoder -> share in [0, 1]; empty without logits.
    """
    if encoders.logits is None:
        return {}
    return {
        name: encoders.scores(encoders.trace(name).features)["agreement"]
        for name in encoders.compared
    }
