"""Agreement with the expert's predictions, which needs no labels."""

from __future__ import annotations

from .subject import Subject


def measure(subject: Subject) -> dict[str, float]:
    """Share of images on which argmax logits(f) = argmax logits(f*), with the expert's f*.

    Returns:
        Encoder -> share in [0, 1]; empty without logits.
    """
    if subject.logits is None:
        return {}
    return {
        name: subject.scores(subject.trace(name).features)["agreement"] for name in subject.compared
    }
