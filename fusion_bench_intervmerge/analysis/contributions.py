"""What each block's edit contributes: each is switched off in turn, and all others stay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Json
from ..model.model import InterventionModel
from .base import EXPERT, TaskEncoders, finish, walk
from .bias import bias


def without_each(encoders: TaskEncoders, model: InterventionModel) -> dict[tuple[str, int], Tensor]:
    """Image features with one edit switched off.

    What comes before that edit does not change, so each network goes on from the whole model's
    states there.

    Returns:
        (site, block) -> (images, projection_dim), in the encoder's order; block is 0 at the site
        ``output``.
    """
    # edit -> the number of blocks before it
    edits = {
        (site, block): model.tower.num_blocks if site == "output" else block
        for site, placement in model.placements.items()
        for block in placement.blocks
    }
    edits = dict(sorted(edits.items(), key=lambda edit: edit[1]))
    features: dict[tuple[str, int], list[Tensor]] = {edit: [] for edit in edits}
    with model.for_task(encoders.task):
        for images in encoders.batches(model.tower):
            for done, states in enumerate(walk(model.tower, images)):
                for place, start in edits.items():
                    if start == done:
                        with model.for_task(encoders.task, without=place):
                            features[place].append(finish(model.tower, states, start))
    return {edit: torch.cat(parts) for edit, parts in features.items()}


def measure(encoders: TaskEncoders) -> dict[str, list[Json]]:
    """The change that switching an edit off makes: value without it - value with it.

    Returns:
        Repaired model -> for each edit ``site``, ``block`` (null at the site ``output``) and the
        change of ``bias`` (of the image features), ``agreement`` and ``accuracy``, the latter two
        if logits and labels allow. An edit that helps has a positive change of bias and negative
        ones of the others.
    """
    expert = encoders.trace(EXPERT).features
    changes = {}
    for name, model in encoders.models.items():
        whole = _values(encoders, encoders.trace(name).features, expert)
        changes[name] = [
            {"site": site, "block": None if site == "output" else block}
            | {k: v - whole[k] for k, v in _values(encoders, features, expert).items()}
            for (site, block), features in without_each(encoders, model).items()
        ]
    return changes


def _values(encoders: TaskEncoders, features: Tensor, expert: Tensor) -> dict[str, float]:
    return {"bias": bias(features, expert), **encoders.scores(features)}
