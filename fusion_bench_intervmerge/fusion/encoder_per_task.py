"""Models that are an encoder a task: a rival's, and the experts themselves, the upper bound."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from fusion_bench.models.modulator import ModulatedModel
from torch import Tensor, nn

from ..encoders.base import VisionTower
from .experts import ExpertPool


class EncoderPerTask(nn.Module):
    """Encodes by the task's encoder, for one task after the other.

    Args:
        pool: the experts that it was made of.

    Attributes:
        tasks: those it can encode for.
    """

    def __init__(self, pool: ExpertPool):
        super().__init__()
        self.tasks = pool.tasks

    @abstractmethod
    def tower_for(self, task: str) -> VisionTower:
        """The task's encoder."""

    @torch.no_grad()
    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features (batch, projection_dim) for a task, or for one task an image.

        Raises:
            ValueError: no task, or one that is none of the model's.
        """
        if isinstance(task, str) or task is None:
            if task not in self.tasks:
                raise ValueError(f"{task!r} is none of the model's tasks: {', '.join(self.tasks)}")
            return self.tower_for(task).to(images.device).features(images)
        parts = {name: [i for i, t in enumerate(task) if t == name] for name in dict.fromkeys(task)}
        features = torch.cat([self.encode(images[rows], name) for name, rows in parts.items()])
        order = torch.tensor([row for rows in parts.values() for row in rows])
        return features[order.argsort()]

    def extra_parameters(self) -> dict[str, int]:
        """All that the modules hold beyond one encoder."""
        one = _numbers(self.tower_for(self.tasks[0]))
        return {"total": sum(p.numel() for p in self.parameters()) - one}


class ExpertPerTask(EncoderPerTask):
    """Each task is encoded by its own expert; one expert is in memory at a time."""

    def __init__(self, pool: ExpertPool):
        super().__init__(pool)
        self._pool, self._loaded = pool, ""
        self.tower_for(self.tasks[0])

    def tower_for(self, task: str) -> VisionTower:
        if task != self._loaded:
            self.tower: VisionTower = self._pool.tower(task).requires_grad_(False).eval()
            self._loaded = task
        return self.tower

    def extra_parameters(self) -> dict[str, int]:
        """All experts but one."""
        return {"total": (len(self.tasks) - 1) * _numbers(self.tower)}


class ModelPerTask(EncoderPerTask):
    """All tasks' encoders in memory.

    Args:
        models: task -> vision model.
        pool: the experts that they were made of.
    """

    def __init__(self, models: Mapping[str, nn.Module], pool: ExpertPool):
        super().__init__(pool)
        towers = [pool.wrap(models[task]).requires_grad_(False).eval() for task in pool.tasks]
        self.towers = nn.ModuleList(towers)

    def tower_for(self, task: str) -> VisionTower:
        return self.towers[self.tasks.index(task)]  # type: ignore[return-value]


class ToldItsTask(EncoderPerTask):
    """FusionBench's ``ModulatedModel``, whose weights become a task's own in place.

    Args:
        model: the model.
        pool: the experts that it was made of.
    """

    def __init__(self, model: ModulatedModel, pool: ExpertPool):
        super().__init__(pool)
        self.model = model
        self.tower = pool.wrap(model.backbone).requires_grad_(False).eval()

    def tower_for(self, task: str) -> VisionTower:
        self.model.set_task(task)
        return self.tower


def _numbers(tower: VisionTower) -> int:
    return sum(p.numel() for p in tower.mergeable().values())
