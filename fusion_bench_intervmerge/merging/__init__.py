"""Merging in weight space: task vectors, the coefficients that weigh them, and their mixture."""

from .coefficients import CoefficientSettings, initial_coefficients
from .mixture import Mixture, mix
from .task_vector import TaskVector

__all__ = ["CoefficientSettings", "Mixture", "TaskVector", "initial_coefficients", "mix"]
