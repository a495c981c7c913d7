"""Edits of a representation: their forms, their settings, and where they act. Pure torch."""

from .config import SITES, InterventionConfig, read_interventions
from .functions import ACTIVATIONS, FUNCTION_NAMES, Function, build_function
from .placement import Placement

__all__ = [
    "ACTIVATIONS",
    "FUNCTION_NAMES",
    "SITES",
    "Function",
    "InterventionConfig",
    "Placement",
    "build_function",
    "read_interventions",
]
