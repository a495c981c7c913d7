"""The merged encoder with its per-task edits: one module, and one folder on disk."""
