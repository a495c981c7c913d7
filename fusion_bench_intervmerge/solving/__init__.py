"""Edits found in closed form instead of trained."""

from .regression import Moments, Regression
from .solve import Solution, SolveSettings, allocate, solve

__all__ = ["Moments", "Regression", "Solution", "SolveSettings", "allocate", "solve"]
