"""Training of edits and coefficients: which images, experts' features, losses, the loop."""

from ..images import DataSettings
from .loop import Distillation, DistillationError, distill
from .losses import LOSSES
from .optimizer import ThriceAdam
from .schedule import Schedule
from .settings import DistillSettings

__all__ = [
    "LOSSES",
    "DataSettings",
    "DistillSettings",
    "Distillation",
    "DistillationError",
    "Schedule",
    "ThriceAdam",
    "distill",
]
