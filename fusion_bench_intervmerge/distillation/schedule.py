"""Which images are seen, and when."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..images import DataSettings, choose_images, generator_of


class Schedule:
    """One task's images, step by step.

    It follows from (seed, task, number of images) alone: every method sees the same images at a
    seed, whatever other tasks there are.

    Args:
        task: the task's name.
        num_images: how many images the task's split has.
        steps: number of steps; with 0, ``unique`` has every image that may be seen.
        data: which images may be seen, and how many a step.
        seed: any integer.

    Attributes:
        unique: dataset indices of the images seen, in the order of their first use.
        rows: (steps, batch_size), positions in ``unique``.

    Raises:
        ConfigError: there are no images.
    """

    def __init__(self, task: str, num_images: int, steps: int, data: DataSettings, seed: int = 0):
        subset = torch.tensor(choose_images(task, num_images, data, seed))
        order = generator_of(seed, "order", task)
        needed = steps * data.batch_size or len(subset)
        epochs = [
            subset[torch.randperm(len(subset), generator=order)]
            for _ in range(math.ceil(needed / len(subset)))
        ]
        seen = torch.cat(epochs)[:needed]
        self.unique: list[int] = list(dict.fromkeys(seen.tolist()))
        position = {image: row for row, image in enumerate(self.unique)}
        rows = torch.tensor([position[i] for i in seen.tolist()])
        self.rows: Tensor = rows[: steps * data.batch_size].view(steps, data.batch_size)
