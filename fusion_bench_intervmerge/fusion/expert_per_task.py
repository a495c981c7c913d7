"""The experts themselves as one model: the upper bound that a merge is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..encoders import VisionTower
from .experts import ExpertPool


class ExpertPerTask(nn.Module):
    """Each task is encoded by its own expert; one expert is in memory at a time.

    Args:
        pool: where the experts come from.
    """

    def __init__(self, pool: ExpertPool):
        super().__init__()
        self._pool = pool
        self._load(pool.tasks[0])

    def _load(self, task: str) -> None:
        self.tower: VisionTower = self._pool.tower(task).requires_grad_(False).eval()
        self._loaded = task

    @property
    def tasks(self) -> list[str]:
        return self._pool.tasks

    @torch.no_grad()
    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features of the task's expert, (batch, projection_dim).

        Raises:
            ValueError: no task, or one without an expert.
        """
        if task is None:
            raise ValueError("there is no merged model among experts; name a task")
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"no expert for task {task!r}; there are: {self.tasks}")
            if task != self._loaded:
                device = self.tower.device
                self._load(task)
                self.tower.to(device)
            return self.tower.features(images)
        parts = {name: [i for i, t in enumerate(task) if t == name] for name in dict.fromkeys(task)}
        features = torch.cat([self.encode(images[rows], name) for name, rows in parts.items()])
        order = torch.tensor([row for rows in parts.values() for row in rows])
        return features[order.argsort()]

    def extra_parameters(self) -> dict[str, int]:
        """All experts but one."""
        own = sum(p.numel() for p in self.tower.mergeable().values())
        return {"total": (len(self.tasks) - 1) * own}
