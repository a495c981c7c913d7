"""Training of edits and coefficients: which images, experts' features, losses, the loop."""

from .loop import Distillation, DistillationError, Interrupted, distill, interruptible
from .losses import LOSSES
from .schedule import Schedule
from .settings import DataSettings, MethodSettings
from .state import Progress, StateFolder

__all__ = [
    "LOSSES",
    "DataSettings",
    "Distillation",
    "DistillationError",
    "Interrupted",
    "MethodSettings",
    "Progress",
    "Schedule",
    "StateFolder",
    "distill",
    "interruptible",
]
