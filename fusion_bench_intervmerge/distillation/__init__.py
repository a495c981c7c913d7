"""Training of edits and coefficients: which images, experts' features, losses, the loop."""

from .loop import Distillation, DistillationError, Interrupted, distill, interruptible
from .losses import LOSSES
from .optimizer import ThriceAdam
from .schedule import Schedule
from .state import Progress, StateFolder

__all__ = [
    "LOSSES",
    "Distillation",
    "DistillationError",
    "Interrupted",
    "Progress",
    "Schedule",
    "StateFolder",
    "ThriceAdam",
    "distill",
    "interruptible",
]
