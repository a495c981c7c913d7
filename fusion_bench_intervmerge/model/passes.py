"""Routing and encoding in one forward pass: what no edit reaches is computed once, and read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .prefix import Images, Prefix, prefix_of
from .router import Router, rows_of

if TYPE_CHECKING:
    from .model import InterventionModel


def read(model: InterventionModel, images: Tensor) -> tuple[Prefix, Tensor, Tensor]:
    """What no edit reaches, of images (batch, 3, image_size, image_size).

    Returns:
        how to go on from it, what is kept of each image, and the router's row of each image.
    """
    prefix = prefix_of(model)
    kept = prefix.of(images)
    # where the embedding is edited, the router reads it as it is without the edit
    states = prefix.unedited(kept) if isinstance(prefix, Images) else kept
    return prefix, kept, rows_of(states, model.tower.num_tokens, model.tower.prefix_tokens)


@torch.no_grad()
def route(model: InterventionModel, images: Tensor) -> list[str | None]:
    """As ``InterventionModel.route``."""
    return _router(model)(read(model, images)[2])


def encode_routed(model: InterventionModel, images: Tensor) -> Tensor:
    """As ``InterventionModel.encode`` with the task ``auto``."""
    prefix, kept, rows = read(model, images)
    tasks = _router(model)(rows)
    named = [task for task in tasks if task is not None]
    if len(named) == len(tasks):
        with model.for_task(named, len(images)):
            return prefix.features(kept)
    known = torch.tensor([task is not None for task in tasks], device=kept.device)
    with model.for_task(None):
        merged = prefix.features(kept[~known])
    features = merged.new_empty(len(images), merged.shape[1])
    features[~known] = merged
    if named:
        with model.for_task(named):
            features[known] = prefix.features(kept[known])
    return features


def check_reading(model: InterventionModel, router: Router) -> None:
    """Make sure that a router reads what this encoder gives.

    Raises:
        ValueError: it reads another number of values an image.
    """
    size = model.tower.image_size
    blank = torch.zeros(1, 3, size, size, device=model.device, dtype=model.dtype)
    needed = read(model, blank)[2].shape[1]
    if len(router.reading.mean) != needed:
        raise ValueError(
            f"router.safetensors: reads {len(router.reading.mean)} numbers an image, the encoder "
            f"gives {needed}"
        )


def _router(model: InterventionModel) -> Router:
    if model.router is None or not model.router.tasks:
        raise ValueError(
            "the model has no router that would tell tasks; fit_router(model, images), or "
            "method.router=gaussian before it is saved, gives it one"
        )
    return model.router
