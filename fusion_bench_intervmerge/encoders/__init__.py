"""Vision towers behind one interface, one file per family.

A subclass of ``VisionTower``, here or in another package, is known by its ``family`` once it is
imported. These modules import their libraries only when they build something: a Hugging Face user
need not wait for open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..config import ConfigError
from . import dinov2, huggingface, openclip  # noqa: F401 - they define the families
from .adapters import merge_adapters
from .base import MissingProjectionError, VisionTower, check_expert


def families() -> dict[str, type[VisionTower]]:
    """Every family of towers by name."""
    return {cls.family: cls for cls in VisionTower.__subclasses__()}


def tower_from_spec(spec: Mapping[str, object]) -> VisionTower:
    """Build the tower that ``VisionTower.spec`` described, weights yet to be loaded.

    Raises:
        ValueError: the family is unknown, or cannot build a tower of these sizes.
    """
    family, known = spec.get("family"), families()
    if not isinstance(family, str) or family not in known:
        raise ValueError(f"unknown tower family {family!r}; known: {', '.join(known)}")
    try:
        return known[family].from_spec(spec)
    except ConfigError:
        raise
    except Exception as error:  # heads that do not divide the width, and whatever else there may be
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tower: {family} cannot build it ({reason})") from error


def as_tower(model: nn.Module, projection: nn.Linear | None = None) -> VisionTower:
    """Wrap a vision model.

    Args:
        model: a tower (returned as it is), or a model of a known family: Hugging Face's
            ``CLIPVisionModel`` (with ``projection``), ``CLIPVisionModelWithProjection`` or
            ``CLIPModel``; OpenCLIP's ``VisionTransformer``, or anything that holds one as
            ``model.visual`` (FusionBench's ``ImageEncoder``) or ``visual``. Adapters of PEFT are
            merged, into a copy.
        projection: CLIP's visual projection, for a ``CLIPVisionModel``.

    Raises:
        MissingProjectionError: the projection is missing.
        TypeError: no tower is known for that class, or an adapter that cannot be merged.
    """
    if isinstance(model, VisionTower):
        return model
    model = merge_adapters(model)
    for family in families().values():
        if (tower := family.wrap(model, projection)) is not None:
            return tower
    raise TypeError(
        f"no vision tower is known for {type(model).__module__}.{type(model).__name__}; "
        f"known families: {', '.join(families())}"
    )


__all__ = [
    "MissingProjectionError",
    "VisionTower",
    "as_tower",
    "check_expert",
    "families",
    "tower_from_spec",
]
