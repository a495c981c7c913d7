"""Reading images once, and keeping what the loop will need of them.

One pass over a task's images, with its expert in memory, gives the expert's features and the
states at which the loop starts. States are kept up to a limit of memory; images beyond it are read
again when their turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..images import Datasets, read_images
from .schedule import Schedule

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

    def first_pass(
        self, task: str, batch_size: int, prepare: Prepare
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read a task's images once; keep what ``prepare`` makes of them while there is room.

        Yields:
            Positions in the schedule's ``unique`` and the images (batch, 3, height, width).
        """
        unique = self.schedules[task].unique
        rows = torch.arange(len(unique)).split(batch_size)
        batches = [[(task, unique[row]) for row in part.tolist()] for part in rows]
        room: int | None = None
        for part, images in zip(
            rows, read_images(self.datasets, batches, self.num_workers), strict=True
        ):
            if room is None or int(part[0]) < room:
                states = prepare(images)
                if room is None:
                    fits = int(self._limit // (states[0].numel() * states.element_size()))
                    room = min(fits, len(unique))
                    shape = (room, *states.shape[1:])
                    self._kept[task] = torch.empty(shape, dtype=states.dtype)
                fitting = part[part < room]
                self._kept[task][fitting] = states[: len(fitting)].cpu()
            yield part, images

    def stream(self, plan: Sequence[Mapping[str, Tensor]], prepare: Prepare) -> Iterator[Tensor]:
        """States for one forward pass after another.

        Args:
            plan: for each pass task -> rows (positions in that task's ``unique``).
            prepare: makes states of images that were not kept.

        Yields:
            (images of the pass, ...) in the order of the plan's tasks and rows.
        """
        missing = [self._missing(entry) for entry in plan]
        reader = read_images(self.datasets, [keys for keys in missing if keys], self.num_workers)
        for entry, keys in zip(plan, missing, strict=True):
            fresh = prepare(next(reader)) if keys else None
            yield self._assemble(entry, fresh)

    def _missing(self, entry: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        return [
            (task, self.schedules[task].unique[row])
            for task, rows in entry.items()
            for row in rows[rows >= len(self._kept.get(task, ()))].tolist()
        ]

    def _assemble(self, entry: Mapping[str, Tensor], fresh: Tensor | None) -> Tensor:
        parts, used = [], 0
        for task, rows in entry.items():
            kept = self._kept.get(task)
            if fresh is None:
                assert kept is not None
                parts.append(kept[rows])
                continue
            states = torch.empty(len(rows), *fresh.shape[1:], dtype=fresh.dtype)
            old = rows < (0 if kept is None else len(kept))
            if kept is not None:
                states[old] = kept[rows[old]]
            count = int((~old).sum())
            states[~old] = fresh[used : used + count].cpu()
            used += count
            parts.append(states)
        return torch.cat(parts)
