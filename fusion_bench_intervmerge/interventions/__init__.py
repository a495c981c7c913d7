"""Edits of a representation: their forms, their settings, and where they act. Pure torch."""

from .functions import build_function

__all__ = ["build_function"]
