"""EMR-Merging: one unified task vector for all, a mask and a scale for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fusion_bench.method.emr_merging import EMRMerging as HostEMRMerging
from torch import Tensor, nn

from ...encoders import VisionTower
from ...protocols import Repair
from ..experts import ExpertPool


class EMRMerging(Repair):
    """Elect, mask and rescale: theta_t = theta0 + s_t * (m_t * tau) (arXiv 2405.17461, section 3).

    The merge is FusionBench's. No images and no training; the merge that is repaired beside it is
    not used.
    """

    def repair(self, pool: Any, merged: VisionTower) -> nn.Module:
        return ModulatedEncoder(HostEMRMerging().run(pool.pool), pool)


class ModulatedEncoder(nn.Module):
    """FusionBench's ``EMRModulatedModel`` as a task-conditional model.

    Args:
        model: its weights become a task's own in place, so that one task at a time is encoded.
        pool: the experts that it was made of.
    """

    def __init__(self, model: Any, pool: ExpertPool):
        super().__init__()
        self.model = model
        self.tower = pool.wrap(model.backbone).requires_grad_(False).eval()
        self._tasks = list(pool.tasks)

    @property
    def tasks(self) -> list[str]:
        return self._tasks

    @torch.no_grad()
    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features (batch, projection_dim) of the task's weights.

        Raises:
            ValueError: not one task of the model's.
        """
        if not isinstance(task, str) or task not in self._tasks:
            raise ValueError(f"{task!r} is none of the model's tasks: {', '.join(self._tasks)}")
        self.model.set_task(task)
        return self.tower.features(images)

    def extra_parameters(self) -> dict[str, Any]:
        """The unified vector beside the pretrained weights; 32 bits of a mask count as a number."""
        vector = sum(p.numel() for p in self.model.unified_task_vector.parameters())
        return {"total": vector + len(self._tasks) * (-(-vector // 32) + 1)}
