"""Cross-task linearity by stitching: Figure 5 of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from .subject import EXPERT, Subject, finish, walk


def stitch(subject: Subject, name: str) -> list[Tensor]:
    """Image features of networks that begin as one encoder and end as the expert.

    Cut c takes the embedding and blocks 0 to c - 1 from the encoder, with its edits for the task,
    and blocks c on and the readout from the expert. So that the curve joins the two whole networks,
    cut 0 is the expert with its own embedding, and the last cut the encoder with its own readout:
    an edit of the image features (Surgery) acts at the last cut alone.

    Args:
        subject: the task.
        name: the encoder.

    Returns:
        For each cut, 0 to num_blocks, (images, projection_dim).
    """
    expert = subject.expert
    inner: list[list[Tensor]] = [[] for _ in range(1, expert.num_blocks)]
    with subject.encoder(name) as tower:
        for images in subject.batches(tower):
            for cut, states in enumerate(walk(tower, images)):
                if 0 < cut < expert.num_blocks:
                    handed_over = states.to(expert.device, expert.dtype)
                    inner[cut - 1].append(finish(expert, handed_over, cut))
    ends = subject.trace(EXPERT).features, subject.trace(name).features
    return [ends[0], *map(torch.cat, inner), ends[1]]


def measure(subject: Subject) -> dict[str, dict[str, list[float]]]:
    """What stitched networks predict.

    Returns:
        Encoder -> ``agreement`` with the expert and, with labels, ``accuracy``: a share in [0, 1]
        for each cut; empty without logits.
    """
    if subject.logits is None:
        return {}
    found = {}
    for name in subject.compared:
        scores = [subject.scores(features) for features in stitch(subject, name)]
        found[name] = {key: [score[key] for score in scores] for key in scores[0]}
    return found
