"""What each block's edit contributes: each is switched off in turn, and all others stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model import InterventionModel
from .bias import bias
from .subject import EXPERT, Subject, finish, walk


def without_each(subject: Subject, model: InterventionModel) -> dict[tuple[str, int], Tensor]:
    """Image features with one edit switched off.

    What comes before that edit does not change, so each network goes on from the whole model's
    states there.

    Returns:
        (site, block) -> (images, projection_dim), in the encoder's order; block is 0 at the site
        ``output``.
    """
    # where the states that an edit is the first to change are: the blocks behind them
    edits = {
        (site, block): model.tower.num_blocks if site == "output" else block
        for site, placement in model.placements.items()
        for block in placement.blocks
    }
    edits = dict(sorted(edits.items(), key=lambda edit: edit[1]))
    found: dict[tuple[str, int], list[Tensor]] = {edit: [] for edit in edits}
    with model.for_task(subject.task):
        for images in subject.batches(model.tower):
            for done, states in enumerate(walk(model.tower, images)):
                for (site, block), start in edits.items():
                    if start == done:
                        with model.without_edit(site, block):
                            found[site, block].append(finish(model.tower, states, start))
    return {edit: torch.cat(parts) for edit, parts in found.items()}


def measure(subject: Subject) -> dict[str, list[dict[str, Any]]]:
    """The change that switching an edit off makes: value without it - value with it.

    Returns:
        Repaired model -> for each edit ``site``, ``block`` (null at the site ``output``) and the
        change of ``bias`` (of the image features), ``agreement`` and ``accuracy``, the latter two
        where logits and labels allow. An edit that helps has a positive change of bias and
        negative ones of the others.
    """
    expert = subject.trace(EXPERT).features
    found = {}
    for name, model in subject.models.items():
        whole = _values(subject, subject.trace(name).features, expert)
        found[name] = [
            {"site": site, "block": None if site == "output" else block}
            | {k: v - whole[k] for k, v in _values(subject, features, expert).items()}
            for (site, block), features in without_each(subject, model).items()
        ]
    return found


def _values(subject: Subject, features: Tensor, expert: Tensor) -> dict[str, float]:
    return {"bias": bias(features, expert), **subject.scores(features)}
