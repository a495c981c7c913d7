"""Cross-task linearity by stitching: Figure 5 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from . import EXPERT, Drawing, Found

if TYPE_CHECKING:
    from torch import Tensor

    from .base import TaskEncoders

PLACE = 20


def stitch(encoders: TaskEncoders, name: str) -> list[Tensor]:
    """Image features of networks that begin as one encoder and end as the expert.

    Cut c takes the embedding and blocks 0 to c - 1 from the encoder, with its edits for the task,
    and blocks c on and the readout from the expert. So that the curve joins the two whole networks,
    cut 0 is the expert with its own embedding, and the last cut the encoder with its own readout:
    an edit of the image features (Surgery) acts at the last cut alone.

    Args:
        encoders: the task's.
        name: the encoder.

    Returns:
        For each cut, 0 to num_blocks, (images, projection_dim).
    """
    import torch

    from .base import finish, walk

    expert = encoders.expert
    inner: list[list[Tensor]] = [[] for _ in range(1, expert.num_blocks)]
    with encoders.encoder(name) as tower:
        for images in encoders.batches(tower):
            for cut, states in enumerate(walk(tower, images)):
                if 0 < cut < expert.num_blocks:
                    handed_over = states.to(expert.device, expert.dtype)
                    inner[cut - 1].append(finish(expert, handed_over, cut))
    ends = encoders.trace(EXPERT).features, encoders.trace(name).features
    return [ends[0], *map(torch.cat, inner), ends[1]]


def measure(encoders: TaskEncoders) -> dict[str, dict[str, list[float]]]:
    """What stitched networks predict.

    Returns:
        Encoder -> ``agreement`` with the expert and, with labels, ``accuracy``: a share in [0, 1]
        for each cut; empty without logits.
    """
    if encoders.logits is None:
        return {}
    found = {}
    for name in encoders.compared:
        scores = [encoders.scores(features) for features in stitch(encoders, name)]
        found[name] = {key: [score[key] for score in scores] for key in scores[0]}
    return found


def figures(found: Found) -> Iterator[Drawing]:
    """Accuracy by cut; agreement where some task had no labels."""
    tasks = found["stitching"]
    values = [value for of in tasks.values() for value in of.values()]
    curves = {
        share: {
            name: 100 * pd.DataFrame({task: of[name][share] for task, of in tasks.items()})
            for name in next(iter(tasks.values()))
        }
        for share in ("accuracy", "agreement")
        if all(share in value for value in values)
    }
    share = next(iter(curves))
    what = {"accuracy": "Accuracy", "agreement": "Agreement with the expert's predictions"}[share]
    yield (
        "stitching",
        "Stitching",
        f"{what} of a network whose first blocks are the model's and whose others are the "
        "expert's, by the number of blocks from the model. At 0 it is the expert, at the right "
        "end the model with its own readout.",
        lambda canvas: canvas.curves(curves[share], "blocks from the model", share),
    )
