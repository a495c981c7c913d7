"""Which images are seen, and when."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..errors import ConfigError


class Schedule:
    """One task's images, step by step.

    It follows from (seed, task, number of images) alone: every method sees the same images at a
    seed, and a task the same ones whatever tasks stand beside it.

    Args:
        task: the task's name.
        num_images: how many images the task's split has.
        steps: number of steps.
        batch_size: images a step.
        fraction: share of the split that may be seen, in (0, 1] (Table 8 of the paper).
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
        seed: int = 0,
    ):
        for where, value in (("steps", steps), ("data.batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(where, f"{value!r}", "a whole number from 1")
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ConfigError("data.fraction", f"{fraction!r}", "a number in (0, 1]")
        if num_images < 1:
            raise ConfigError("modelpool", f"task {task!r} has no images in this split")
        subset = torch.randperm(num_images, generator=_generator(seed, "subset", task))
        subset = subset[: math.ceil(fraction * num_images)]
        order = _generator(seed, "order", task)
        needed = steps * batch_size
        epochs = [
            subset[torch.randperm(len(subset), generator=order)]
            for _ in range(math.ceil(needed / len(subset)))
        ]
        seen = torch.cat(epochs)[:needed]
        self.task = task
        self.subset_size = len(subset)
        self.unique: list[int] = list(dict.fromkeys(seen.tolist()))
        position = {image: row for row, image in enumerate(self.unique)}
        self.rows: Tensor = torch.tensor([position[i] for i in seen.tolist()]).view(
            steps, batch_size
        )


def _generator(seed: int, purpose: str, task: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {task}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
