"""IntervMerge: task-specific interventions that repair merged CLIP vision encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distillation import DistillSettings, distill
    from .interventions import InterventionConfig
    from .model import InterventionModel
    from .routing import RouterSettings, fit_router
    from .solving import SolveSettings, solve

__version__ = "0.1.0"
__all__ = [
    "DistillSettings",
    "InterventionConfig",
    "InterventionModel",
    "RouterSettings",
    "SolveSettings",
    "distill",
    "fit_router",
    "solve",
]

_HOME = {
    "DistillSettings": ".distillation",
    "InterventionConfig": ".interventions",
    "InterventionModel": ".model",
    "RouterSettings": ".routing",
    "SolveSettings": ".solving",
    "distill": ".distillation",
    "fit_router": ".routing",
    "solve": ".solving",
}


def __getattr__(name: str) -> Any:
    """Load torch only when something of the package is used: the config hook must stay light."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name], __name__), name)
