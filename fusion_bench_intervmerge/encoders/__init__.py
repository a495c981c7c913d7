"""Vision towers of Hugging Face and OpenCLIP behind one interface."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ..errors import ConfigError
from .base import VisionTower, check_expert

# what transformers' CLIP models call themselves; SigLIP's and DINOv2's are laid out otherwise
_CLIP = ("clip", "clip_vision_model")
_FAMILIES = {"huggingface": "HuggingFaceTower", "openclip": "OpenCLIPTower"}


def tower_from_spec(spec: Mapping[str, Any]) -> VisionTower:
    """Build the tower that ``VisionTower.spec`` described, weights yet to be loaded.

    Raises:
        ValueError: the family is unknown, or the sizes are none of a tower's.
    """
    family = spec.get("family")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(f"unknown tower family {family!r}; known: {', '.join(_FAMILIES)}")
    # imported on demand: a Hugging Face user need not wait for open_clip, nor the other way round
    module = importlib.import_module(f"{__name__}.{family}")
    try:
        return getattr(module, _FAMILIES[family]).from_spec(spec)
    except ConfigError:
        raise
    except Exception as error:  # heads that do not divide the width, and whatever else there may be
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tower: nothing that {family} can build ({reason})") from error


class MissingProjectionError(TypeError):
    """A vision model that comes without CLIP's visual projection."""


def as_tower(model: nn.Module, projection: nn.Linear | None = None) -> VisionTower:
    """Wrap a vision model.

    Args:
        model: a tower (returned as it is); Hugging Face's ``CLIPVisionModel`` (with
            ``projection``), ``CLIPVisionModelWithProjection`` or ``CLIPModel``; OpenCLIP's
            ``VisionTransformer``, or anything that holds one as ``model.visual`` (FusionBench's
            ``ImageEncoder``) or ``visual``.
        projection: CLIP's visual projection, for a ``CLIPVisionModel``.

    Raises:
        MissingProjectionError: the projection is missing.
        TypeError: no tower is known for that class.
    """
    if isinstance(model, VisionTower):
        return model
    visual = getattr(getattr(model, "model", model), "visual", model)
    if type(visual).__module__.startswith("open_clip."):
        from .openclip import MEAN, STD, OpenCLIPTower

        mean, std = _normalisation(model) or (MEAN, STD)
        return OpenCLIPTower(visual, mean, std)
    if getattr(getattr(model, "config", None), "model_type", None) in _CLIP:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        from .huggingface import HuggingFaceTower

        if hasattr(model, "visual_projection"):
            inner: Any = model.vision_model
            if hasattr(inner, "encoder") and not isinstance(inner, CLIPVisionModel):
                wrapper = CLIPVisionModel(CLIPVisionConfig(**inner.config.to_dict()))
                target = getattr(wrapper, "vision_model", wrapper)
                target.load_state_dict(inner.state_dict())
                inner = wrapper.eval()
            return HuggingFaceTower(
                inner, copy.deepcopy(cast("nn.Linear", model.visual_projection))
            )
        if projection is not None:
            return HuggingFaceTower(model, copy.deepcopy(projection))
        raise MissingProjectionError(
            f"{type(model).__name__} needs CLIP's visual projection beside it"
        )
    raise TypeError(
        f"no vision tower is known for {type(model).__module__}.{type(model).__name__}; "
        "known: transformers' CLIP and open_clip's VisionTransformer"
    )


def _normalisation(model: nn.Module) -> tuple[tuple, tuple] | None:
    """Mean and std of the preprocessing that FusionBench's ``ImageEncoder`` carries."""
    steps = getattr(getattr(model, "val_preprocess", None), "transforms", [])
    for step in steps:
        if hasattr(step, "mean") and hasattr(step, "std"):
            return tuple(step.mean), tuple(step.std)
    return None


__all__ = ["MissingProjectionError", "VisionTower", "as_tower", "check_expert", "tower_from_spec"]
