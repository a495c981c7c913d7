"""Training of edits and coefficients: which images, experts' features, losses, the loop."""

from .loop import Distillation, DistillationError, Interrupted, distill
from .losses import LOSSES
from .schedule import Schedule

__all__ = ["LOSSES", "Distillation", "DistillationError", "Interrupted", "Schedule", "distill"]
