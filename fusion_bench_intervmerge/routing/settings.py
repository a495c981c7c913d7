"""What a user may say of a router."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from ..errors import ConfigError
from ..settings import Settings, whole
from .routers import ROUTERS


def _known(name: object) -> object:
    if isinstance(name, str) and name not in ROUTERS:
        raise ConfigError("", f"there is no router {name!r}", ", ".join(ROUTERS))
    return name


class RouterSettings(Settings):
    """What tells the task of an image.

    Args:
        name: ``gaussian``, ``linear``, ``means``, ``nearest`` or ``subspace``.
        images: at most so many images a task to fit it on, of those that the edits saw.
        dims: numbers that an image is told by: the leading principal components of what it reads.
        threshold: share of a task's own images that may be refused as of no known task; null
            refuses none.
    """

    name: Annotated[
        str, BeforeValidator(_known), Field(description=f"one of {', '.join(ROUTERS)}")
    ] = "gaussian"
    images: Annotated[int, whole(2, 10**9)] = 512
    dims: Annotated[int, whole(1, 2**16)] = 64
    threshold: Annotated[
        float | None, Field(ge=0, le=0.5, description="null, or a number in [0, 0.5]")
    ] = None


def read_settings(value: object) -> RouterSettings:
    """A router's name alone, or a mapping, or settings as they are.

    Raises:
        ConfigError: neither, or a setting that does not fit.
    """
    if isinstance(value, RouterSettings):
        return value
    return RouterSettings.read({"name": value} if isinstance(value, str) else value)
