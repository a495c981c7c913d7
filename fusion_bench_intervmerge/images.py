"""Which images are learned from, and reading them; for solving and for distillation alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from .errors import ConfigError
from .settings import Seed, Settings, nested, whole


class DataSettings(Settings):
    """The unlabelled images to learn from.

    Args:
        split: ``test``, ``validation`` or ``train``: where they come from.
        fraction: share of that split that may be seen; the same images for every method at a seed.
        images: at most so many images a task; null: as many as ``fraction`` says.
        batch_size: images a task and step, over all processes.
        num_workers: processes that decode images.
        cache_gb: GiB of memory for the states of images that are seen again.
    """

    split: Literal["test", "validation", "train"] = "test"
    fraction: Annotated[float, Field(gt=0, le=1, description="a fraction in (0, 1]")] = 1.0
    images: Annotated[int | None, whole(1, 10**9, before="null, or ")] = None
    batch_size: Annotated[int, whole(1, 10**6)] = 16
    num_workers: Annotated[int, whole(0, 1024)] = 0
    cache_gb: Annotated[float, Field(ge=0, le=10**6, description="a number, 0 or more")] = 2.0


class RepairSettings(Settings):
    """What solving and training have in common.

    Args:
        data: the unlabelled images to learn from (``DataSettings``).
        seed: decides initial edits, images and their order.
    """

    data: Annotated[DataSettings, nested(DataSettings)] = DataSettings()
    seed: Seed = 0

    @classmethod
    def of(cls, settings: Self | None, keywords: Mapping[str, object]) -> Self:
        """Settings as an object, or by keywords: those of ``data`` may stand among them.

        Raises:
            ConfigError: a setting that does not exist, or not with that value.
            TypeError: both an object and keywords.
        """
        if settings is not None and keywords:
            raise TypeError(f"settings as an object, and also by keyword: {', '.join(keywords)}")
        if settings is not None:
            return settings
        of_data = {k: v for k, v in keywords.items() if k in DataSettings.model_fields}
        rest = {k: v for k, v in keywords.items() if k not in of_data}
        data = DataSettings.read(rest.get("data", {})).to_dict() | of_data
        return cls.read(rest | {"data": data})


class ImageDataset(Protocol):
    """A task's images: pixel values, or (pixel values, anything), by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


Datasets = Mapping[str, ImageDataset]  # by task


def choose_images(task: str, available: int, data: DataSettings, seed: int = 0) -> list[int]:
    """Indices of the images that may be seen, in random order.

    They follow from (seed, task, number of images) alone, so that every method sees the same ones;
    a smaller share is the beginning of a larger one.

    Args:
        task: the task's name.
        available: how many images the split has.
        data: what share of them (Table 8 of the paper), and at most how many.
        seed: any integer.

    Raises:
        ConfigError: there are no images.
    """
    if available < 1:
        raise ConfigError("modelpool", f"task {task!r} has no images in this split")
    order = torch.randperm(available, generator=generator_of(seed, "subset", task))
    return order[: math.ceil(data.fraction * available)][: data.images].tolist()


def generator_of(seed: int, purpose: str, task: str) -> torch.Generator:
    """Random numbers for one purpose and task, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed} {purpose} {task}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Pixels(Dataset[Tensor]):
    """Images of several tasks, addressed by (task, index); labels are left behind."""

    def __init__(self, datasets: Datasets):
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        item = self.datasets[key[0]][key[1]]
        return cast(Tensor, item[0] if isinstance(item, (tuple, list)) else item)


def read_images(
    datasets: Datasets,
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
