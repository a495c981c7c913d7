"""The routers. One file a router: its name is the file's name.

To add one, put a module beside these with one subclass of ``Router``; nothing else changes.
"""

from __future__ import annotations

from ...registry import class_in, names_in
from .base import Router

ROUTERS = names_in(__path__)


def router_class(name: str) -> type[Router]:
    """The class of one of ``ROUTERS``."""
    return class_in(f"{__name__}.{name}", Router)  # type: ignore[type-abstract]


__all__ = ["ROUTERS", "Router", "router_class"]
