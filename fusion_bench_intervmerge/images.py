"""Which images of a data set are seen, and reading them; for solving and for distillation alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import ConfigError


def choose_images(
    task: str, available: int, *, fraction: float = 1.0, at_most: int | None = None, seed: int = 0
) -> list[int]:
    """Indices of the images that may be seen, in random order.

    They follow from (seed, task, number of images) alone, so every method sees the same ones at a
    seed; a smaller share is the beginning of a larger one.

    Args:
        task: the task's name.
        available: how many images the split has.
        fraction: share of them, in (0, 1] (Table 8 of the paper).
        at_most: an upper limit beside it; None for none.
        seed: any integer.

    Raises:
        ConfigError: a share or a limit out of range, or no images at all.
    """
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ConfigError("data.fraction", f"{fraction!r}", "a number in (0, 1]")
    if at_most is not None and at_most < 1:
        raise ConfigError("data.images", f"{at_most!r}", "a whole number from 1, or null")
    if available < 1:
        raise ConfigError("modelpool", f"task {task!r} has no images in this split")
    order = torch.randperm(available, generator=generator_of(seed, "subset", task))
    return order[: math.ceil(fraction * available)][:at_most].tolist()


def generator_of(seed: int, purpose: str, task: str) -> torch.Generator:
    """Random numbers for one purpose and task, the same whatever else is drawn."""
    digest = hashlib.sha256(f"{seed} {purpose} {task}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Pixels(Dataset):
    """Images of several tasks, addressed by (task, index); labels are left behind."""

    def __init__(self, datasets: Mapping[str, Dataset]):
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        item = self.datasets[key[0]][key[1]]  # type: ignore[index]
        return item[0] if isinstance(item, (tuple, list)) else item


def read_images(
    datasets: Mapping[str, Dataset],
    batches: Sequence[Sequence[tuple[str, int]]],
    num_workers: int,
) -> Iterator[Tensor]:
    """Batches of images, decoded in worker processes ahead of their use."""
    # A sampler that is a list of batches; DataLoader has no name for that but batch_sampler.
    return iter(
        DataLoader(
            Pixels(datasets),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
