"""Training of edits and coefficients: which images, experts' features, losses, the loop."""

from ..data import DataSettings, Schedule
from .loop import Distillation, DistillationError, distill
from .losses import LOSSES
from .settings import DistillSettings, TripleStepAdam

__all__ = [
    "LOSSES",
    "DataSettings",
    "DistillSettings",
    "Distillation",
    "DistillationError",
    "Schedule",
    "TripleStepAdam",
    "distill",
]
