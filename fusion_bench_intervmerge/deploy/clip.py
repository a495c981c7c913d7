"""A repaired model as an ordinary CLIP, with its text tower."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from ..config import ConfigError
from ..encoders.base import VisionTower, through
from ..encoders.huggingface import HuggingFaceTower
from ..encoders.openclip import OpenCLIPTower
from ..interventions.functions import Function
from ..interventions.placement import Placement
from ..model.model import InterventionModel

T = TypeVar("T")


def to_clip_model(
    model: InterventionModel, task: str, clip: str | Path | nn.Module | None = None
) -> Any:
    """One task's repaired encoder with the text tower of the CLIP that the experts started from.

    Args:
        model: it is not changed.
        task: whose edits to build in.
        clip: for a Hugging Face encoder the id or the folder of a ``CLIPModel``, or one; by default
            the ``base_model`` of the model's metadata. For an OpenCLIP encoder an ``open_clip``
            model, or its name with a schema (``hf-hub:...``, ``local-dir:...``). It is not changed.

    Returns:
        transformers' ``CLIPModel``, or ``open_clip``'s model, in evaluation mode, on the model's
        device.

    Raises:
        ValueError: the model has no such task.
        ConfigError: no CLIP is known, it is not found, or its encoder has another shape.
    """
    edits = model.fold().edits_of(task)
    whole = load_clip(model, clip)
    tower = _tower_of(whole, model.tower.family)
    try:
        tower.load_weights(model.tower.weights())
    except (KeyError, ValueError) as error:
        raise ConfigError("clip", f"another encoder than the model's ({error})") from None
    for site, block, function in edits.places():
        if site == "output":
            module = whole.visual_projection if tower.family == "huggingface" else whole.visual
        else:
            module = tower.module(site, int(block))
        _build_in(module, SiteEdit(model.placements[site], int(block), function))
    if hasattr(whole, "save_pretrained"):
        whole.save_pretrained = _refuse_to_save
    return whole.requires_grad_(False).eval().to(model.device)


def load_clip(model: InterventionModel, clip: str | Path | nn.Module | None = None) -> Any:
    """A copy of the CLIP of ``to_clip_model``, without edits; a ConfigError if it is not found."""
    if isinstance(clip, nn.Module):
        return copy.deepcopy(clip)
    if model.tower.family == "openclip":
        import open_clip

        return from_base(open_clip.create_model, model, clip)
    from transformers import CLIPModel

    return from_base(CLIPModel.from_pretrained, model, clip)


def image_processor(model: InterventionModel) -> Any:
    """transformers' image processor for a model's images.

    Raises:
        ConfigError: neither the model nor its CLIP says how images are processed.
    """
    from transformers import AutoImageProcessor, CLIPImageProcessor

    if settings := model.metadata.get("preprocessor"):
        return CLIPImageProcessor(**settings)
    if model.tower.family == "openclip":
        spec = model.tower.spec()
        size = spec["image_size"]
        return CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=spec["mean"],
            image_std=spec["std"],
        )
    return from_base(AutoImageProcessor.from_pretrained, model)


def from_base(
    load: Callable[[str], T], model: InterventionModel, clip: str | Path | None = None
) -> T:
    """Load a part of the CLIP that a model started from, by its id or folder.

    The model's metadata name it if ``clip`` does not.

    Raises:
        ConfigError: no CLIP is known, or it is not found.
    """
    allowed = "the id or folder of a CLIP, such as openai/clip-vit-base-patch32"
    name = clip or model.metadata.get("base_model")
    if not name:
        raise ConfigError("clip", "the model does not say which CLIP it started from", allowed)
    try:
        return load(str(name))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError("clip", f"{str(name)!r} is not found ({reason})", allowed) from None


def _tower_of(clip: Any, family: str) -> VisionTower:
    """A tower over a CLIP's own modules, not over copies of them."""
    if family == "openclip" and hasattr(clip, "visual"):
        return OpenCLIPTower(clip.visual)
    if family == "huggingface" and hasattr(clip, "visual_projection"):
        return HuggingFaceTower(clip.vision_model, clip.visual_projection)
    kind = f"{type(clip).__module__}.{type(clip).__name__}"
    raise ConfigError("clip", f"a {kind} has no place for a {family} encoder")


class SiteEdit(nn.Module):
    """A copy of one task's edit at one site of one block."""

    def __init__(self, placement: Placement, block: int, function: Function):
        super().__init__()
        self.placement, self.block = placement, block
        self.function = copy.deepcopy(function)

    def forward(self, z: Tensor) -> Tensor:
        return self.placement.apply(z, self.block, self.function)


def _build_in(module: nn.Module, edit: SiteEdit) -> None:
    """Let a module's output pass through an edit, which is moved and copied with the module."""
    if isinstance(module, nn.Sequential):  # it runs whatever is registered in it
        module.append(edit)
        return
    module.add_module("edit", edit)
    module.register_forward_hook(_pass_through_edit)


def _pass_through_edit(module: Any, args: object, output: Any) -> Any:
    # The edit of the module that is called: a copy of the CLIP has its own.
    return through(module.edit, module, args, output)


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    raise ConfigError(
        "save_pretrained",
        "a CLIP checkpoint has no place for the edits, which would be lost",
        "InterventionModel.save_pretrained and to_clip_model after loading, or intervmerge export",
    )
