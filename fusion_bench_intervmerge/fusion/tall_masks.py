"""TALL-masks: one merged task vector for all, and a mask of it for each task."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from ..config import Settings
from ..encoders.base import VisionTower
from ..merging import TaskVector
from ..model.protocols import TaskConditionalModel
from ..results import Result
from .encoder_per_task import ModelPerTask
from .rivals import Rival


class TallMaskSettings(Settings):
    """The settings of ``TallMasks``.

    Args:
        threshold: lambda; larger ones keep less of the merged vector.
    """

    threshold: Annotated[float, Field(ge=0, description="a number, 0 or more")] = 0.6


class TallMasks(Rival):
    """theta_t = theta0 + m_t * tau with m_t = |tau_t| >= lambda |tau - tau_t|, tau = sum of tau_t.

    TALL-masks (arXiv 2405.07813, section 4), which stores tau beside theta0, and a bit a number and
    task. fusion-bench 0.2.33 has it too, but compares |theta0 - tau_t| instead of |tau_t|.
    """

    Settings = TallMaskSettings

    def repair(self, pool: Any, merged: VisionTower) -> nn.Module:
        theta0 = {n: p.detach() for n, p in pool.tower("_pretrained_").mergeable().items()}
        vectors = [TaskVector.between(pool.tower(t).mergeable(), theta0) for t in pool.tasks]
        total = sum(vectors[1:], vectors[0])
        towers = {}
        for task, vector in zip(pool.tasks, vectors, strict=True):
            towers[task] = pool.tower("_pretrained_")
            for name, parameter in towers[task].mergeable().items():
                own, all_ = vector.tensors[name], total.tensors[name]
                mask = own.abs() >= self.settings.threshold * (all_ - own).abs()
                parameter.data += mask * all_
        numbers = sum(tensor.numel() for tensor in theta0.values())
        self._bytes = 4 * numbers + len(pool.tasks) * -(-numbers // 8)
        return ModelPerTask(towers, pool)

    def record(self, model: TaskConditionalModel) -> Result:
        size = {"extra_parameters": self._bytes // 4, "bytes": self._bytes}
        return Result(kind="rival", needs_task=True, passes=1.0, **size)
