"""Repaired models for programs that do not have this package."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import export
    from .heads import zero_shot_heads
    from .plain import PlainEncoder, plain_encoder

__all__ = ["PlainEncoder", "export", "plain_encoder", "zero_shot_heads"]

_HOME = {
    "PlainEncoder": ".plain",
    "export": ".files",
    "plain_encoder": ".plain",
    "zero_shot_heads": ".heads",
}


def __getattr__(name: str) -> object:
    """Load torch only when something is used: the command's ``--help`` needs none."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
