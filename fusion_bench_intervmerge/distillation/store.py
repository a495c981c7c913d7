"""Reading images once, and keeping what the loop will need of them.

One pass over a task's images, with its expert in memory, gives the expert's features and the
states at which the loop starts. States are kept up to a limit of memory; images beyond it are read
again when they are needed.
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
