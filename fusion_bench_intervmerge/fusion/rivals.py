"""FusionBench's own methods beside the repairs, whatever they return.

Some give one encoder, some a mixture of experts, some one model a task, some a model that is told
its task. Each becomes something that a task pool can evaluate on the same footing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.models.modulator import ModulatedModel
from pydantic import Field
from torch import nn

from ..config import ConfigError, Settings, nested
from ..encoders.base import VisionTower
from ..model.protocols import Repair, TaskConditionalModel
from ..results import Result, Results
from .encoder_per_task import ModelPerTask, ToldItsTask
from .experts import ExpertPool
from .host import check_task_pool, split_settings
from .hosted_models import hosted
from .merge import run_method
from .screen import host_in_the_log, one_line


class Storage(Settings):
    """What a method stores beyond one model, where its modules hold more than it needs.

    Args:
        models: tensors of the model's size, in fp32.
        bits: a task and number of the model, for masks.
    """

    models: Annotated[float, Field(ge=0, description="a number, 0 or more")] = 0.0
    bits: Annotated[float, Field(ge=0, description="a number, 0 or more")] = 0.0

    def bytes(self, numbers: int, tasks: int) -> int:
        """Over all tasks, for a model of so many numbers."""
        return round(numbers * (4 * self.models + tasks * self.bits / 8))


class RivalSettings(Settings):
    """A FusionBench method among a comparison's ``methods`` or ``rivals``.

    Args:
        method: its config.
        storage: what it stores; by default all that its modules hold beyond one encoder.
        passes: of an encoder, an image.
        take: which model, of a method that gives several by name.
    """

    method: dict[str, object]
    storage: Annotated[Storage, nested(Storage)] | None = None
    passes: Annotated[float, Field(gt=0, description="a number above 0")] = 1
    take: str | None = None


class Rival(LightningFabricMixin, BaseAlgorithm, Repair):
    """A method that starts from the experts, whatever merge is repaired beside it.

    It runs alone (``method=rivals/NAME``) as it does in a comparison, by its ``Settings``.
    """

    @one_line
    def __init__(self, **settings: object):
        settings, host = split_settings(settings)
        super().__init__(**host)
        self.settings: Any = self.Settings.read(settings)

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """The method's model, for FusionBench's task pools.

        Raises:
            ConfigError: a pool that does not fit, in one line.
        """
        pool = ExpertPool(modelpool)
        check_task_pool(self._program, pool.family)
        tower = pool.tower("_pretrained_")
        model: Any = self.repair(pool, tower)
        if self.fabric.is_global_zero:
            name = type(self).__name__
            result = self.record(model).model_copy(update={"method": name})
            Results(tasks=pool.tasks, models={name: result}).write(self.log_dir)
        return hosted(model, tower)


class FusionBenchMethod(Rival):
    """Any method of FusionBench that merges CLIP vision encoders."""

    Settings = RivalSettings

    def repair(self, pool: Any, merged: VisionTower) -> nn.Module:
        """What the method returns, ready for a task pool.

        Raises:
            ConfigError: it returns no model.
        """
        fabric, take = self.fabric, self.settings.take
        found = run_method(self.settings.method, pool.pool, fabric, self._program)
        if take is not None and isinstance(found, Mapping):
            found = found.get(take)
        one = sum(p.numel() for p in merged.mergeable().values())
        model = as_task_conditional(found, pool)
        if self.settings.storage is not None:
            self._bytes = self.settings.storage.bytes(one, len(pool.tasks))
        else:
            tensors = (*model.parameters(), *model.buffers())  # each of them once
            held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._bytes = max(0, held - 4 * one)
        return model

    def record(self, model: object) -> Result:
        return Result(
            kind="rival",
            extra_parameters=self._bytes // 4,
            bytes=self._bytes,
            # the latter is FusionBench's own mark of a model that its task pool tells the task
            needs_task=isinstance(model, TaskConditionalModel)
            or bool(getattr(model, "is_surgery_model", False)),
            passes=float(self.settings.passes),
        )


def as_task_conditional(found: object, pool: ExpertPool) -> nn.Module:
    """A method's result as a module that a task pool evaluates.

    Args:
        found: a module; or a mapping with ``models``, one a task.
        pool: the experts that it was made of.

    Returns:
        A ``TaskConditionalModel`` where the result depends on the task, else the module itself.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(found, Mapping) and isinstance(found.get("models"), Mapping):
        return ModelPerTask(found["models"], pool)
    if isinstance(found, ModulatedModel):
        return ToldItsTask(found, pool)
    if isinstance(found, nn.Module):
        return found
    raise ConfigError("method", f"gives a {type(found).__name__}", "a model, or one a task")
