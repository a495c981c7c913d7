"""Edits in closed form instead of trained; and a router, which is fitted in closed form too."""

from .fit_router import fit_router
from .regression import Moments, Regression
from .solve import Solution, SolveSettings, allocate, solve

__all__ = [
    "Moments",
    "Regression",
    "Solution",
    "SolveSettings",
    "allocate",
    "fit_router",
    "solve",
]
