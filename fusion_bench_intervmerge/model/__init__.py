"""The merged encoder with its per-task edits: one module, and one folder on disk."""

from .model import InterventionModel
from .router import RouterSettings

__all__ = ["InterventionModel", "RouterSettings"]
