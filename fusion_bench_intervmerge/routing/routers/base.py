"""The base class of routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...schema import Json
from ..reading import Reading

if TYPE_CHECKING:
    from ..settings import RouterSettings

Kept = dict[str, Tensor]
FOLDS = 4
QUANTILES = 51  # of the shares 0, 0.01, ... 0.5


class Router(ABC):
    """Tells the task of an image by what is kept of each task's images.

    What is kept of a task follows from its own images alone: tasks are added and dropped, and the
    others' stay to the bit.

    Args:
        reading: from states to the rows that the router sees.
        settings: what it was asked for.

    Attributes:
        threshold: share of a task's own images that may be refused; None refuses none.
        kept: task -> named tensors, float32 as they are saved.
    """

    name: ClassVar[str]

    def __init__(self, reading: Reading, settings: RouterSettings):
        self.reading, self.settings = reading, settings
        self.threshold = settings.threshold
        self.kept: dict[str, Kept] = {}

    @abstractmethod
    def keep(self, rows: Tensor) -> Kept:
        """What is kept of a task: (images, components) -> named tensors."""

    @abstractmethod
    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        """How much rows (images, components) look like each task's: (images, tasks), float64."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shapes of what ``keep`` gives; None where the number of images decides."""

    @property
    def tasks(self) -> list[str]:
        return list(self.kept)

    def add(self, task: str, rows: Tensor) -> None:
        """Learn a task, or learn it anew, from rows of its images (images, dims of a row)."""
        rows = self.reading(rows)
        kept = self._kept(rows)
        # How well images of the task fit that it was not fitted on: what `threshold` refers to.
        fold, fit = torch.arange(len(rows)) % FOLDS, torch.empty(len(rows), dtype=torch.float64)
        for held_out in fold.unique():
            inside, outside = fold != held_out, fold == held_out
            others = {**self.kept, task: self._kept(rows[inside])}
            fit[outside] = self.scores(others, rows[outside])[:, list(others).index(task)]
        shares = torch.linspace(0, 0.5, QUANTILES, dtype=torch.float64)
        self.kept[task] = kept | {"quantiles": fit.quantile(shares).float()}

    def _kept(self, rows: Tensor) -> Kept:
        return {name: tensor.float().contiguous() for name, tensor in self.keep(rows).items()}

    def drop(self, task: str) -> None:
        """Forget a task; one that was never learnt is none to forget."""
        self.kept.pop(task, None)

    def __call__(self, rows: Tensor) -> list[str | None]:
        """The task of each row (images, dims of a row); None: of no known task."""
        best, index = self.scores(self.kept, self.reading(rows)).max(dim=1)
        tasks: list[str | None] = [self.tasks[i] for i in index.tolist()]
        if self.threshold is None:
            return tasks
        place = torch.tensor(self.threshold * 2 * (QUANTILES - 1), dtype=torch.float64)
        low, high = (
            torch.stack([k["quantiles"][int(at)] for k in self.kept.values()]).double()
            for at in (place.floor(), place.ceil())
        )
        least = low.lerp(high, place - place.floor())
        refused = best < least[index]
        return [None if no else t for t, no in zip(tasks, refused.tolist(), strict=True)]

    # -- as files ----------------------------------------------------------------------------------

    def config(self) -> Json:
        """Its settings as JSON values."""
        return self.settings.to_dict() | {"threshold": self.threshold}

    def count(self) -> int:
        """How many numbers it is."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name: ``reading.<tensor>`` and ``tasks.<task>.<tensor>``."""
        found = {f"reading.{name}": tensor for name, tensor in self.reading.tensors().items()}
        for task, kept in self.kept.items():
            found |= {f"tasks.{task}.{name}": tensor for name, tensor in kept.items()}
        return found

    def load(self, task: str, kept: Kept) -> None:
        """Take over what was kept of a task.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape, or not finite.
        """
        shapes = self.shapes() | {"quantiles": (QUANTILES,)}
        if kept.keys() != shapes.keys():
            raise ValueError(f"task {task!r} has {sorted(kept)}, and needs {sorted(shapes)}")
        for name, shape in shapes.items():
            found = tuple(kept[name].shape)
            fits = len(found) == len(shape) and all(
                wanted in (None, size) for wanted, size in zip(shape, found, strict=True)
            )
            if not fits or not kept[name].isfinite().all():
                raise ValueError(f"tasks.{task}.{name} does not fit, or has no finite numbers")
        self.kept[task] = kept

    @property
    def components(self) -> int:
        """How many numbers a row has."""
        return self.reading.directions.shape[1]
