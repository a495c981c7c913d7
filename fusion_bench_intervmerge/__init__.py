"""IntervMerge: task-specific interventions that repair merged CLIP vision encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import CalibrationSettings, calibrate
    from .deploy.clip import to_clip_model
    from .distillation.loop import distill
    from .distillation.settings import DistillSettings
    from .interventions.config import InterventionConfig
    from .model.model import InterventionModel
    from .model.router import RouterSettings
    from .solving.fit_router import fit_router
    from .solving.recalibrate import recalibrate
    from .solving.solve import SolveSettings, solve

__version__ = "0.1.0"
__all__ = [
    "CalibrationSettings",
    "DistillSettings",
    "InterventionConfig",
    "InterventionModel",
    "RouterSettings",
    "SolveSettings",
    "calibrate",
    "distill",
    "fit_router",
    "recalibrate",
    "solve",
    "to_clip_model",
]

_HOME = {
    "CalibrationSettings": ".calibration",
    "DistillSettings": ".distillation.settings",
    "InterventionConfig": ".interventions.config",
    "InterventionModel": ".model.model",
    "RouterSettings": ".model.router",
    "SolveSettings": ".solving.solve",
    "calibrate": ".calibration",
    "distill": ".distillation.loop",
    "fit_router": ".solving.fit_router",
    "recalibrate": ".solving.recalibrate",
    "solve": ".solving.solve",
    "to_clip_model": ".deploy.clip",
}


def __getattr__(name: str) -> Any:
    """Load torch only when something of the package is used: the config hook must stay light."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name], __name__), name)
