"""Edits found in closed form instead of trained."""

from .budget import allocate
from .regression import Moments, Regression
from .settings import SolveSettings
from .solver import Solution, solve

__all__ = ["Moments", "Regression", "Solution", "SolveSettings", "allocate", "solve"]
