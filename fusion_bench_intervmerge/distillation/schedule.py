"""Which images are seen, and when."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..images import choose_images, generator_of


class Schedule:
    """One task's images, step by step.

    It follows from (seed, task, number of images) alone: every method sees the same images at a
    seed, whatever other tasks there are.

    Args:
        task: the task's name.
        num_images: how many images the task's split has.
        steps: number of steps; with 0, ``unique`` has every image that may be seen.
        batch_size: images per step.
        fraction, at_most: which images may be seen, as in ``choose_images``.
        seed: any integer.

    Attributes:
        unique: dataset indices of the images seen, in the order of their first use.
        rows: (steps, batch_size), positions in ``unique``.

    Raises:
        ConfigError: a size or fraction out of range.
    """

    def __init__(
        self,
        task: str,
        num_images: int,
        *,
        steps: int,
        batch_size: int,
        fraction: float = 1.0,
        at_most: int | None = None,
        seed: int = 0,
    ):
        for where, value, least in (("steps", steps, 0), ("data.batch_size", batch_size, 1)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(where, f"{value!r}", f"a whole number from {least}")
        subset = torch.tensor(
            choose_images(task, num_images, fraction=fraction, at_most=at_most, seed=seed)
        )
        order = generator_of(seed, "order", task)
        needed = steps * batch_size or len(subset)
        epochs = [
            subset[torch.randperm(len(subset), generator=order)]
            for _ in range(math.ceil(needed / len(subset)))
        ]
        seen = torch.cat(epochs)[:needed]
        self.subset_size = len(subset)
        self.unique: list[int] = list(dict.fromkeys(seen.tolist()))
        position = {image: row for row, image in enumerate(self.unique)}
        rows = torch.tensor([position[i] for i in seen.tolist()])
        self.rows: Tensor = rows[: steps * batch_size].view(steps, batch_size)
