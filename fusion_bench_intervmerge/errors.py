"""The errors of bad input: what is wrong, where, and what is allowed, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

GROUPS = ("method", "modelpool", "taskpool", "fabric")


class ConfigError(ValueError):
    """Bad input, said in one line.

    Args:
        where: the config key (or argument) at fault, e.g. ``interventions.attention.rank``.
        problem: what is wrong with it.
        allowed: what it may be instead.
    """

    def __init__(self, where: str, problem: str, allowed: str | None = None):
        super().__init__(where, problem, allowed)  # all of them, so that it can be pickled
        self.where, self.problem, self.allowed = where, problem, allowed

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (
            f"; allowed: {self.allowed}" if self.allowed else ""
        )

    def under(self, key: str) -> ConfigError:
        """The same error of a setting that is nested in ``key``.

        A key of another config group, such as ``modelpool.models``, stays as it is.
        """
        if self.where.partition(".")[0] in GROUPS:
            return self
        where = ".".join(part for part in (key, self.where) if part)
        return ConfigError(where, self.problem, self.allowed)


def unknown_key(key: object, known: Iterable[str], noun: str = "setting") -> ConfigError:
    """A key that is none of those known, perhaps a misspelt one."""
    known = list(known)
    near = difflib.get_close_matches(str(key).lower(), known, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    return ConfigError(str(key), f"no such {noun}{meant}", ", ".join(known))


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors inside are of settings that are nested in ``key`` (see ``ConfigError.under``)."""
    try:
        yield
    except ConfigError as error:
        raise error.under(key) from None


class ArtifactError(ValueError):
    """A folder that is no artifact, or one whose files do not belong together."""
