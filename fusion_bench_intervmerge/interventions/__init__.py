"""Edits of a representation: their forms, their settings, and where they act. Pure torch."""

from .config import InterventionConfig, read_interventions
from .edits import Edits
from .functions import ACTIVATIONS, FUNCTIONS, Function, build_function
from .placement import Placement
from .sites import SITES, Site

__all__ = [
    "ACTIVATIONS",
    "FUNCTIONS",
    "SITES",
    "Edits",
    "Function",
    "InterventionConfig",
    "Placement",
    "Site",
    "build_function",
    "read_interventions",
]
