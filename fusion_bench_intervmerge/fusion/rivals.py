"""Methods that stand beside the repairs: FusionBench's own, whatever they return, and TALL-masks.

Some give one encoder, some a mixture of experts, some one model per task, some a model that must
be told the task. Each becomes something that a task pool can evaluate on the same footing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.models.modulator import ModulatedModel
from pydantic import Field
from torch import Tensor, nn

from ..config import ConfigError, Json, Settings
from ..encoders.base import VisionTower
from ..merging import task_vector
from ..model.protocols import Repair, TaskConditionalModel
from ..results import Result
from .host import Method, check_task_pool, host_in_the_log, one_line
from .hosted import hosted
from .merge import run_method
from .pools import ExpertPool, prepare_task_pool

NotNegative = Annotated[float, Field(ge=0, description="a number, 0 or more")]


# -- an encoder per task ---------------------------------------------------------------------------


class EncoderPerTask(nn.Module):
    """Encodes by the task's own encoder; without a task, by the pretrained one."""

    def __init__(self, pool: ExpertPool):
        super().__init__()
        self.tasks, self._pool = pool.tasks, pool
        self._pretrained: VisionTower | None = None

    @abstractmethod
    def tower_for(self, task: str) -> VisionTower:
        """The task's encoder."""

    @torch.no_grad()
    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features (batch, projection_dim) for a task, or for one task per image.

        Raises:
            ValueError: the model has no encoder for a task.
        """
        if task is None:
            if self._pretrained is None:
                self._pretrained = self._pool.tower("_pretrained_").requires_grad_(False).eval()
            return self._pretrained.to(images.device).features(images)
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"no encoder for task {task!r}; there are: {self.tasks}")
            return self.tower_for(task).to(images.device).features(images)
        rows = {name: [i for i, t in enumerate(task) if t == name] for name in dict.fromkeys(task)}
        features = torch.cat([self.encode(images[own], name) for name, own in rows.items()])
        order = torch.tensor([row for own in rows.values() for row in own])
        return features[order.argsort()]

    def extra_parameters(self) -> dict[str, int]:
        """All encoders but one."""
        return {"total": (len(self.tasks) - 1) * count(self.tower_for(self.tasks[0]))}


class ExpertPerTask(EncoderPerTask):
    """Each task is encoded by its own expert, the upper bound; one is in memory at a time."""

    def __init__(self, pool: ExpertPool):
        super().__init__(pool)
        self._loaded = ""
        self.tower_for(self.tasks[0])

    def tower_for(self, task: str) -> VisionTower:
        if task != self._loaded:
            self.tower: VisionTower = self._pool.tower(task).requires_grad_(False).eval()
            self._loaded = task
        return self.tower


class ModelPerTask(EncoderPerTask):
    """All tasks' encoders in memory, made of task -> vision model."""

    def __init__(self, models: Mapping[str, nn.Module], pool: ExpertPool):
        super().__init__(pool)
        towers = [pool.wrap(models[task]).requires_grad_(False).eval() for task in pool.tasks]
        self.towers: Any = nn.ModuleList(towers)

    def tower_for(self, task: str) -> VisionTower:
        return self.towers[self.tasks.index(task)]


class Modulated(EncoderPerTask):
    """FusionBench's ``ModulatedModel``, whose weights become a task's own in place."""

    def __init__(self, model: ModulatedModel[Any], pool: ExpertPool):
        super().__init__(pool)
        self.model = model
        self.tower = pool.wrap(model.backbone).requires_grad_(False).eval()

    def tower_for(self, task: str) -> VisionTower:
        self.model.set_task(task)
        return self.tower

    def extra_parameters(self) -> dict[str, int]:
        """What the module holds beyond one encoder."""
        return {"total": sum(p.numel() for p in self.parameters()) - count(self.tower)}


def count(tower: VisionTower) -> int:
    """How many numbers a tower's mergeable tensors have."""
    return sum(p.numel() for p in tower.mergeable().values())


# -- the rivals ------------------------------------------------------------------------------------


class Rival(Method, Repair):
    """A method that starts from the experts, whatever merge is repaired beside it.

    A new one is one file: a subclass with ``Settings`` and ``repair``, which runs by itself
    (``method=rivals/NAME``) and among the ``rivals`` of a comparison.
    """

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """The method's model, for FusionBench's task pools.

        Raises:
            ConfigError: a pool that does not fit, in one line.
        """
        pool = ExpertPool(modelpool)
        check_task_pool(self._program, pool.family, pool.tasks)
        prepare_task_pool(self._program)
        tower = pool.tower("_pretrained_")
        model: Any = self.repair(pool, tower)
        name = type(self).__name__
        self.write(pool.tasks, {name: self.record(model).model_copy(update={"method": name})})
        return hosted(model, tower)


class Storage(Settings):
    """What a method stores beyond one model, if its modules hold more than it needs.

    Args:
        models: tensors of the model's size, in fp32.
        bits: for masks, bits per task and number of the model.
    """

    models: NotNegative = 0.0
    bits: NotNegative = 0.0

    def bytes(self, numbers: int, tasks: int) -> int:
        """Over all tasks, for a model of so many numbers."""
        return round(numbers * (4 * self.models + tasks * self.bits / 8))


class RivalSettings(Settings):
    """The settings of ``FusionBenchMethod``.

    Args:
        method: the method's config.
        storage: what it stores; by default all that its modules hold beyond one encoder.
        passes: forward passes of an encoder per image.
        take: which model to take of a method that gives several by name.
    """

    method: dict[str, object]
    storage: Storage | None = None
    passes: Annotated[float, Field(gt=0, description="a number above 0")] = 1
    take: str | None = None


class FusionBenchMethod(Rival):
    """Any method of FusionBench that merges CLIP vision encoders."""

    Settings = RivalSettings

    def repair(self, pool: Any, merged: VisionTower) -> nn.Module:
        """What the method returns, ready for a task pool.

        Raises:
            ConfigError: it does not return a model.
        """
        settings = self.settings
        result = run_method(settings.method, pool.pool, self.fabric, self._program)
        if settings.take is not None and isinstance(result, Mapping):
            result = result.get(settings.take)
        one, model = count(merged), as_task_conditional(result, pool)
        if settings.storage is not None:
            self._bytes = settings.storage.bytes(one, len(pool.tasks))
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


def as_task_conditional(result: object, pool: ExpertPool) -> nn.Module:
    """A module, or a mapping with ``models`` per task, as a module that a task pool evaluates.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(result, Mapping) and isinstance(result.get("models"), Mapping):
        return ModelPerTask(result["models"], pool)
    if isinstance(result, ModulatedModel):
        return Modulated(result, pool)
    if isinstance(result, nn.Module):
        return result
    raise ConfigError("method", f"gives a {type(result).__name__}", "a model, or one per task")


class TallMaskSettings(Settings):
    """The settings of ``TallMasks``.

    Args:
        threshold: lambda; larger ones keep less of the merged vector.
    """

    threshold: NotNegative = 0.6


class TallMasks(Rival):
    """theta_t = theta0 + m_t * tau with m_t = |tau_t| >= lambda |tau - tau_t|, tau = sum of tau_t.

    TALL-masks (arXiv 2405.07813, section 4), which stores tau beside theta0, and a bit per number
    and task. fusion-bench 0.2.33 has it too, but compares |theta0 - tau_t| instead of |tau_t|.
    """

    Settings = TallMaskSettings

    def repair(self, pool: Any, merged: VisionTower) -> nn.Module:
        theta0 = {n: p.detach() for n, p in pool.tower("_pretrained_").mergeable().items()}
        vectors = [task_vector(pool.tower(t).mergeable(), theta0) for t in pool.tasks]
        total = {name: sum(vector[name] for vector in vectors) for name in theta0}
        towers = {}
        for task, vector in zip(pool.tasks, vectors, strict=True):
            towers[task] = pool.tower("_pretrained_")
            for name, parameter in towers[task].mergeable().items():
                own, all_ = vector[name], total[name]
                mask = own.abs() >= self.settings.threshold * (all_ - own).abs()
                parameter.data += mask * all_
        self._bytes = Storage(models=1, bits=1).bytes(count(merged), len(pool.tasks))
        return ModelPerTask(towers, pool)

    def record(self, model: TaskConditionalModel) -> Result:
        size: Json = {"extra_parameters": self._bytes // 4, "bytes": self._bytes}
        return Result(kind="rival", needs_task=True, passes=1.0, **size)
