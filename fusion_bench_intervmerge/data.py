"""Which images are learned from, and reading them; for solving and for distillation alike."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, Protocol, cast

import lightning as L
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from typing_extensions import Self

from .config import ConfigError, Seed, Settings, nested, whole


# == images
# Which images are learned from, and reading them; for solving and for distillation alike.
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


# == progress
# A progress bar for a terminal; nothing at all in a log file.
def bar(fabric: L.Fabric, name: str, total: int, done: int = 0) -> tqdm:
    """A bar on stderr, in the first process alone."""
    hidden = None if fabric.is_global_zero else True  # None: where there is no terminal
    return tqdm(desc=name, total=total, initial=done, disable=hidden, dynamic_ncols=True)


# == precision
# The type to compute in, by Fabric's precision.
DTYPES = {
    "64": torch.float64,
    "32": torch.float32,
    "bf16": torch.bfloat16,
    "16": torch.float16,
}


def computing_dtype(fabric: L.Fabric) -> torch.dtype:
    """The type to compute in, by Fabric's precision."""
    precision = str(getattr(fabric._precision, "precision", "32-true"))
    if precision.partition("-")[0] not in DTYPES:
        raise ConfigError(
            "fabric.precision", f"{precision!r}", "64-true, 32-true, bf16-true, 16-mixed"
        )
    return DTYPES[precision.partition("-")[0]]


# == distillation.schedule
# Which images are seen, and when.
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


# == distillation.store
# Reading images once, and keeping what the loop will need of them.
#
# One pass over a task's images, with its expert in memory, gives the expert's features and the
# states at which the loop starts. States are kept up to a limit of memory; images beyond it are read
# again when they are needed.
#
Prepare = Callable[[Tensor], Tensor]


class ImageStore:
    """What the loop starts from, for every image of every task.

    Args:
        datasets: task -> dataset of (pixel values, ...) or pixel values.
        schedules: task -> schedule.
        limit: bytes of states that may be kept in memory, over all tasks.
        num_workers: worker processes that decode images.
    """

    def __init__(
        self,
        datasets: Datasets,
        schedules: Mapping[str, Schedule],
        limit: float,
        num_workers: int,
    ):
        self.datasets, self.schedules, self.num_workers = datasets, schedules, num_workers
        self._limit = limit / max(1, len(schedules))
        self._kept: dict[str, Tensor] = {}

    def first_pass(self, task: str, batch_size: int, prepare: Prepare) -> Iterator[Tensor]:
        """Read a task's images once; keep what ``prepare`` makes of them while there is room.

        Yields:
            The images of the schedule's ``unique``, (batch, 3, height, width) at a time.
        """
        unique = self.schedules[task].unique
        starts = range(0, len(unique), batch_size)
        batches = [[(task, index) for index in unique[i : i + batch_size]] for i in starts]
        room = len(unique)
        for start, images in zip(
            starts, read_images(self.datasets, batches, self.num_workers), strict=True
        ):
            if start < room:
                states = prepare(images)
                if start == 0:
                    room = min(int(self._limit // states[0].nbytes), room)
                    shape = (room, *states.shape[1:])
                    self._kept[task] = torch.empty(shape, dtype=states.dtype)
                place = self._kept[task][start : start + batch_size]
                place.copy_(states[: len(place)])
            yield images

    def stream(self, plan: Sequence[Mapping[str, Tensor]], prepare: Prepare) -> Iterator[Tensor]:
        """States for one forward pass after another, once ``first_pass`` read every task.

        Args:
            plan: for each pass task -> rows (positions in that task's ``unique``).
            prepare: makes states of images that were not kept.

        Yields:
            (images of the pass, ...) in the order of the plan's tasks and rows.
        """
        missing = [
            [
                (task, self.schedules[task].unique[row])
                for task, rows in entry.items()
                for row in rows[rows >= len(self._kept[task])].tolist()
            ]
            for entry in plan
        ]
        reader = read_images(self.datasets, [keys for keys in missing if keys], self.num_workers)
        for entry, keys in zip(plan, missing, strict=True):
            kept = [(self._kept[task], rows) for task, rows in entry.items()]
            if not keys:
                yield torch.cat([states[rows] for states, rows in kept])
                continue
            old = torch.cat([rows < len(states) for states, rows in kept])
            known = torch.cat([states[rows[rows < len(states)]] for states, rows in kept])
            found = known.new_empty(len(old), *known.shape[1:])
            found[old], found[~old] = known, prepare(next(reader)).cpu()
            yield found


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    """SHA-256 of a file's header, if it has one, and of tensors: names, shapes, types, bytes."""
    sha = hashlib.sha256(b"" if header is None else json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return sha.hexdigest()
