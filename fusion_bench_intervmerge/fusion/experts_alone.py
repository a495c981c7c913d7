"""The experts themselves as one model: the upper bound that a merge is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..encoders import VisionTower
from ..task_aware import TaskAwareModel
from .experts import ExpertPool


class IndividualExperts(TaskAwareModel):
    """Each task is encoded by its own expert; one expert is in memory at a time.

    Args:
        pool: where the experts come from.
    """

    def __init__(self, pool: ExpertPool):
        super().__init__()
        self._pool = pool
        self._task: str | None = None
        self.tower: VisionTower = pool.tower(pool.tasks[0]).requires_grad_(False).eval()
        self._loaded = pool.tasks[0]

    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        if not isinstance(task, str):
            raise ValueError("each expert has one task; name it")
        self.check_task(task)
        if task != self._loaded:
            device = self.tower.device
            self.tower = self._pool.tower(task).requires_grad_(False).eval().to(device)
            self._loaded = task
        with torch.no_grad():
            return self.tower.features(images)

    def native(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._task is None:
            raise ValueError("there is no merged model among experts; name a task")
        return self.encode(pixel_values, self._task)

    @contextmanager
    def for_task(
        self, task: str | Sequence[str] | None, batch: int | None = None
    ) -> Iterator[None]:
        before, self._task = self._task, task if isinstance(task, str) else None
        try:
            yield
        finally:
            self._task = before

    def check_task(self, task: str) -> None:
        if task not in self._pool.tasks:
            raise ValueError(f"no expert for task {task!r}; there are: {self._pool.tasks}")

    @property
    def task_follows(self) -> bool:
        return self.tower.task_follows

    @property
    def task_is_known(self) -> bool:
        return self._task is not None

    @property
    def train_preprocess(self) -> Any:
        """The images' preprocessing, where the tower carries one (OpenCLIP)."""
        return self.tower.train_preprocess  # type: ignore[attr-defined]

    @property
    def val_preprocess(self) -> Any:
        """The images' preprocessing, where the tower carries one (OpenCLIP)."""
        return self.tower.val_preprocess  # type: ignore[attr-defined]
