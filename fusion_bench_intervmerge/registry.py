"""Registries that are folders: one file an entry, known by the file's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def names_in(path: Iterable[str]) -> tuple[str, ...]:
    """The entries of a package, in alphabetical order; ``base`` is what they have in common.

    Args:
        path: the package's ``__path__``.
    """
    found = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in found if name != "base"))


def class_in(module_name: str, base: type[T]) -> type[T]:
    """The one subclass of ``base`` that a module defines; the module is imported for it."""
    module = importlib.import_module(module_name)
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module_name
    )
    return found
