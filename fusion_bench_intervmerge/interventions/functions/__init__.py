"""The forms an edit can take. One file a form: its name is the file's name.

To add a form, put a module beside these with one subclass of ``Function``; nothing else changes.
A subclass defined elsewhere is known by its ``name`` once it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ConfigError, named
from ...registry import class_in, names_in
from .base import ACTIVATIONS, Function, is_parametrized

FUNCTION_NAMES = names_in(__path__)


def function_class(name: str, where: str = "function") -> type[Function]:
    """The class of a form by name.

    Raises:
        ConfigError: no form has that name.
    """
    if name in FUNCTION_NAMES:
        return class_in(f"{__name__}.{name}", Function)  # type: ignore[type-abstract]
    others = {c.name: c for c in _subclasses(Function) if c.name not in FUNCTION_NAMES}
    if name not in others:
        allowed = ", ".join((*FUNCTION_NAMES, *others))
        raise ConfigError(where, f"there is no function {name!r}", allowed)
    return others[name]


def _subclasses(cls: type) -> Iterator[type[Function]]:
    child: type[Function]
    for child in cls.__subclasses__():
        if not is_parametrized(child):
            yield child
            yield from _subclasses(child)


def build_function(
    name: str,
    width: int,
    rank: int,
    *,
    copies: int | None = None,
    activation: str | None = None,
    init: str = "reference",
    generator: torch.Generator | None = None,
    where: str = "interventions",
) -> Function:
    """One intervention function as a module: z (..., width) -> z (..., width).

    Args:
        name: one of ``FUNCTION_NAMES``.
        width: number of entries of a vector that it edits.
        rank: number of directions it works along, 1 to width.
        copies: number of independent edits (one a token position); ``None`` for one.
        activation: ``None`` or one of ``ACTIVATIONS``, for the forms that take one.
        init: ``reference`` (the published start) or ``identity`` (starts at z' = z).
        generator: source of the initial values.
        where: config key to name in errors.

    Raises:
        ConfigError: an unknown name, activation or init, a rank out of range, or a start or an
            activation that the form does not have.
    """
    cls = function_class(name, f"{where}.function")
    with named(where):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= width:
            raise ConfigError(
                "rank", f"{rank!r} does not fit vectors of width {width}", f"1 to {width}"
            )
        if init not in ("reference", "identity"):
            raise ConfigError("init", f"unknown: {init!r}", "reference, identity")
        cls.check(activation, init)
        if activation not in (None, *ACTIVATIONS):
            allowed = f"null, {', '.join(ACTIVATIONS)}"
            raise ConfigError("activation", f"unknown: {activation!r}", allowed)
        return cls(
            width, rank, copies=copies, activation=activation, init=init, generator=generator
        )


__all__ = ["ACTIVATIONS", "FUNCTION_NAMES", "Function", "build_function", "function_class"]
