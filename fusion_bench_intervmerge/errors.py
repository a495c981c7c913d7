"""The errors of bad input: what is wrong, where, and what is allowed, in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """Bad input, said in one line.

    Args:
        where: the config key (or argument) at fault, e.g. ``interventions.attention.rank``.
        problem: what is wrong with it.
        allowed: what it may be instead.
    """

    def __init__(self, where: str, problem: str, allowed: str | None = None):
        self.where = where
        super().__init__(f"{where}: {problem}" + (f"; allowed: {allowed}" if allowed else ""))


class ArtifactError(ValueError):
    """A folder that is no artifact, or one whose files do not belong together."""
