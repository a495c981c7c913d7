"""The routers. One file a router: its name is the file's name.

To add one, put a module beside these with one subclass of ``Router``; nothing else changes.
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import Router

ROUTERS: tuple[str, ...] = tuple(
    sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
)


def router_class(name: str) -> type[Router]:
    """The class of one of ``ROUTERS``."""
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Router)
        and value.__module__ == module.__name__
    )
    return found


__all__ = ["ROUTERS", "Router", "router_class"]
