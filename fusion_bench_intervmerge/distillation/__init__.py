"""Training of edits and coefficients: experts' features, losses, the loop, its state."""

from .settings import TripleStepAdam

__all__ = ["TripleStepAdam"]
