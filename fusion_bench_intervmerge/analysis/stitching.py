"""Cross-task linearity by stitching: Figure 5 of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import EXPERT, TaskEncoders, finish, walk


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
    expert = encoders.expert
    inner: list[list[Tensor]] = [[] for _ in range(1, expert.num_blocks)]
    with encoders.encoder(name) as tower:
        for images in encoders.batches(tower):
            for cut, states in enumerate(walk(tower, images)):
                if 0 < cut < expert.num_blocks:
                    states = states.to(expert.device, expert.dtype)
                    inner[cut - 1].append(finish(expert, states, cut))
    ends = encoders.trace(EXPERT).features, encoders.trace(name).features
    return [ends[0], *map(torch.cat, inner), ends[1]]


def measure(encoders: TaskEncoders) -> dict[str, dict[str, list[float]]]:
    """What stitched networks predict.

    Returns:
        Encoder -> ``agreement`` with the expert and, with labels, ``accuracy``: a share in [0, 1]
        per cut; empty without logits.
    """
    if encoders.logits is None:
        return {}
    shares = {}
    for name in encoders.compared:
        scores = [encoders.scores(features) for features in stitch(encoders, name)]
        shares[name] = {key: [score[key] for score in scores] for key in scores[0]}
    return shares
