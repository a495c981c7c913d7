"""The one trainer: edits (and coefficients) move until the features match the experts'."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
from torch import Tensor

from ..config import ConfigError
from ..data import (
    Datasets,
    ImageStore,
    Interrupted,
    RunFolder,
    Schedule,
    computing_dtype,
    interruptible,
    progress_bar,
    stop_requested,
)
from ..encoders.base import AfterBlock, ExpertLoaders, VisionTower, check_expert
from ..merging import Mixture
from ..model.model import InterventionModel
from .losses import LOSSES, Representations
from .settings import DistillSettings, make_optimizer
from .states import Progress, load_state, save_state

log = logging.getLogger(__name__)

# fp16 gradients of a mean over thousands of features would round to zero
FP16_SCALE = 2.0**12
LOG_EVERY = 10  # steps between two entries in the logs


class DistillationError(RuntimeError):
    """Training cannot go on; the message says which state is kept, if one is."""


@dataclass
class Distillation:
    """The result of ``distill``.

    Attributes:
        losses: (steps, tasks).
        images: task -> dataset indices of the images seen, in the order of first use.
        seconds: wall-clock time of ``features`` (reading images, experts' features) and ``steps``.
        expert_features: task -> (images seen, projection_dim).
        resumed_at: the step at which a stopped run went on, 0 for a fresh one.
        states: where the run's state is on disk, if it is; see ``clear``.
    """

    losses: Tensor
    images: dict[str, list[int]]
    seconds: dict[str, float]
    expert_features: dict[str, Tensor]
    resumed_at: int = 0
    states: RunFolder | None = None

    def clear(self) -> None:
        """Remove the run's state from the disk, once its result is saved elsewhere.

        Until then the same call finds the finished training and returns at once.
        """
        if self.states is not None:
            self.states.clear()

    def by_task(self) -> dict[str, list[float]]:
        """Task -> its loss at each step, for a report; empty if nothing was trained."""
        if not len(self.losses):
            return {}
        columns = zip(self.images, self.losses.T.tolist(), strict=True)
        return {task: [round(loss, 6) for loss in column] for task, column in columns}


def distill(
    model: InterventionModel,
    experts: ExpertLoaders,
    images: Datasets,
    settings: DistillSettings | None = None,
    *,
    mixture: Mixture | None = None,
    fabric: L.Fabric | None = None,
    states: RunFolder | None = None,
    cache: FeatureCache | None = None,
    **keywords: object,
) -> Distillation:
    """Train a model's edits by distillation, without labels (eq 3.2 of the paper).

    At each step every task sees one batch of its images; the loss is the sum over tasks of the mean
    L1 distance between the repaired encoder's image features and the expert's. With frozen
    coefficients no term depends on another task's edits, so that one optimizer over all of them
    gives the same numbers as one task after the other.

    Args:
        model: the model to train, in place.
        experts: task -> function that loads the expert; one expert is in memory at a time. The
            tasks trained are these; others of the model stay as they are.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        settings: the settings of the method's config file.
        mixture: merging coefficients to train along with the edits.
        fabric: device, precision, processes and loggers; one device by default.
        states: where to keep the state of a run that may be stopped; None: nowhere. It is kept
            after the last step as well, until ``Distillation.clear``.
        cache: of these experts and images, if several methods learn from them.
        keywords: instead of ``settings``, its fields and those of its ``data``: ``steps=200,
            batch_size=8``.

    Returns:
        Losses, images seen, seconds, and the experts' features.

    Raises:
        ConfigError: settings that do not fit.
        DistillationError: the loss is not finite; with ``states`` the last good one is kept.
        Interrupted: on Ctrl-C. During training the current step is finished and its state kept;
            a second Ctrl-C does not wait for that.
    """
    settings = DistillSettings.of(settings, keywords)
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    for task in experts:
        model.edits_of(task)
        if task not in images:
            raise ConfigError("modelpool", f"no images for task {task!r}")
    trainer = _Trainer(model, list(experts), images, settings, mixture, fabric)
    with trainer.on_device():
        trained = trainer.trained()
        if not trained:
            raise ConfigError(
                "interventions",
                "there are no edits to train",
                "other inits, or solve(...) first if init is regression",
            )
        optimizer = make_optimizer(settings.optimizer, list(trained.values()))
        progress = Progress(0, torch.empty(0, len(experts)))
        if states is not None:
            progress = load_state(states, progress, settings.steps, trained, optimizer)
        if progress.step:
            log.info("going on from step %d of %d", progress.step, settings.steps)
        resumed_at = progress.step
        started = time.perf_counter()
        with interruptible("reading the experts' features", states):
            targets = trainer.read_experts(experts, cache)
        ready = time.perf_counter()
        with interruptible("training", states):
            trainer.run(optimizer, trained, targets, progress, states)
        finished = time.perf_counter()
    if mixture is not None:
        mixture.write(model.tower)
    return Distillation(
        losses=progress.losses,
        images={task: schedule.unique for task, schedule in trainer.schedules.items()},
        seconds={"features": ready - started, "steps": finished - ready},
        expert_features={task: t["output"].float() for task, t in targets.items()},
        resumed_at=resumed_at,
        states=states if fabric.is_global_zero else None,
    )


class FeatureCache(dict[Hashable, Representations]):
    """Experts' representations in memory, for the next method that learns from the same images.

    It is of one set of experts and images. What comes first stays.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float = 2 * 2**30):
        super().__init__()
        self._room = limit

    def put(self, key: Hashable, representations: Representations) -> None:
        """Keep an entry, if there is room."""
        size = sum(tensor.nbytes for tensor in representations.values())
        if size <= self._room:
            self._room -= size
            self[key] = representations


class _Trainer:
    """The parts of a run that share the model, the images, the device and the precision."""

    def __init__(
        self,
        model: InterventionModel,
        tasks: list[str],
        images: Datasets,
        settings: DistillSettings,
        mixture: Mixture | None,
        fabric: L.Fabric,
    ):
        self.model, self.tasks, self.settings = model, tasks, settings
        self.mixture, self.fabric = mixture, fabric
        data = settings.data
        self.schedules = {
            task: Schedule(task, len(images[task]), settings.steps, data, settings.seed)
            for task in tasks
        }
        self.loss, self.dtype = LOSSES[settings.loss], computing_dtype(fabric)
        self.prefix = model.prefix(moving=mixture is not None, blocks=self.loss.reads_blocks)
        limit, workers = data.cache_gb * 2**30, data.num_workers
        self.store = ImageStore(images, self.schedules, self.prefix.of, limit, workers)
        processes = fabric.world_size
        if data.batch_size % processes:
            raise ConfigError(
                "data.batch_size",
                f"{data.batch_size} images do not divide among {processes} processes",
                f"a multiple of {processes}",
            )
        self.mine = slice(fabric.global_rank, None, processes)
        self.groups = self._groups(data.batch_size // processes)

    def _groups(self, images_per_task: int) -> list[list[str]]:
        """Tasks that share a forward pass: as many as keep the activations within bounds.

        The grouping does not change the numbers; larger passes only have less overhead.
        """
        tower = self.model.tower
        # about 16 tensors of the states' size are kept for a block's backward pass
        per_image = 16 * tower.num_tokens * tower.width * tower.num_blocks * self.dtype.itemsize
        budget = 2**30 if self.fabric.device.type == "cpu" else 24 * 2**30
        size = max(1, budget // (per_image * images_per_task))
        count = math.ceil(len(self.tasks) / size)
        size = math.ceil(len(self.tasks) / count)
        return [self.tasks[i : i + size] for i in range(0, len(self.tasks), size)]

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """The blocks compiled, if the settings say so; afterwards as they were."""
        tower, first = self.model.tower, getattr(self.prefix, "first", 0)
        trained = range(first, tower.num_blocks if self.settings.compile else 0)
        modules = [tower.block(index) for index in trained]
        for module in modules:
            module.compile()
        try:
            yield
        finally:
            for module in modules:
                module._compiled_call_impl = None

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The model on the device and in the precision of the run; afterwards as it was."""
        model, home = self.model, self.model.tower.device
        self._move(self.fabric.device)
        # What is trained is never kept in less than fp32.
        wide = self.trained().values() if self.dtype == torch.float64 else ()
        types = {parameter: parameter.dtype for parameter in wide}
        try:
            for parameter in types:
                parameter.data = parameter.data.double()
            with model.tower.in_dtype(self.dtype), model.tower.cheap_to_train():
                yield
        finally:
            for parameter, dtype in types.items():
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
            model.tower.requires_grad_(False)
            self._move(home)

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        if self.mixture is not None:
            self.mixture.to_device(device)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Everything that moves, by name."""
        parameters = {
            f"{task}.{name}": parameter
            for task in self.tasks
            for name, parameter in self.model.edits_of(task).named_parameters()
        }
        if self.mixture is not None:
            parameters["coefficients"] = self.mixture.coefficients
        return parameters

    # -- before the loop ---------------------------------------------------------------------------

    def read_experts(
        self, experts: ExpertLoaders, cache: FeatureCache | None
    ) -> dict[str, Representations]:
        """The experts' representations of every image seen, one expert in memory at a time."""
        targets = {}
        total = sum(len(schedule.unique) for schedule in self.schedules.values())
        # On a CPU the widest tensors should be small enough for freed memory to be kept.
        at_once = 32 if self.fabric.device.type == "cpu" else 64
        with progress_bar(self.fabric, "experts' features", total) as shown:
            for task in self.tasks:
                seen, split = self.schedules[task].unique, self.settings.data.split
                key = (task, split, tuple(seen), self.fabric.device, self.dtype, self.settings.loss)
                images = self.store.read(task, at_once)  # the loop starts from what it saves
                targets[task] = {} if cache is None else cache.get(key, {})
                if targets[task]:
                    for _ in images:
                        pass
                else:
                    targets[task] = self._read_expert(task, experts[task](), images)
                    if cache is not None:
                        cache.put(key, targets[task])
                shown.update(len(seen))
        return targets

    def _read_expert(
        self, task: str, expert: VisionTower, batches: Iterator[Tensor]
    ) -> Representations:
        check_expert(task, expert, self.model.tower)
        expert = expert.to(self.fabric.device).eval()
        parts: list[Representations] = []
        with torch.no_grad(), expert.in_dtype(self.dtype), expert.cheap_to_train():
            for images in batches:
                pixels = images.to(self.fabric.device, self.dtype)
                part = self.loss.read(partial(_expert_features, expert, pixels))
                parts.append({name: tensor.cpu() for name, tensor in part.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # -- the loop ----------------------------------------------------------------------------------

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, torch.nn.Parameter],
        targets: Mapping[str, Representations],
        progress: Progress,
        states: RunFolder | None,
    ) -> None:
        """Steps from ``progress.step`` to the last; ``progress`` is kept current."""
        steps, start = self.settings.steps, progress.step
        plan = [
            {task: self.schedules[task].rows[step][self.mine] for task in group}
            for step in range(start, steps)
            for group in self.groups
        ]
        passes = zip(plan, self.store.states(plan), strict=True)
        history = torch.cat([progress.losses, torch.empty(steps - start, len(self.tasks))])
        keep = states if self.fabric.is_global_zero else None
        saved = start
        with (
            stop_requested() as stopped,
            self.compiled(),
            progress_bar(self.fabric, "distillation", steps, start) as shown,
        ):
            for step in range(start, steps):
                losses = self._step(passes, targets, optimizer, trained)
                if not torch.isfinite(losses).all():
                    where = ""
                    if keep is not None and step > 0:
                        save_state(keep, progress, trained, optimizer)
                        where = f"; {keep.path}: {keep.progress}"
                    bad = self.tasks[int((~torch.isfinite(losses)).nonzero()[0])]
                    raise DistillationError(
                        f"the loss of task {bad!r} is not finite at step {step}{where}; "
                        "a smaller optimizer.lr may help"
                    )
                optimizer.step()
                done = step + 1
                history[step] = losses
                progress.step, progress.losses = done, history[:done]
                mean = float(losses.mean())
                shown.set_postfix_str(f"loss {mean:.4f}", refresh=False)
                shown.update()
                if done % LOG_EVERY == 0 or done == steps:
                    by_task = zip(self.tasks, losses.tolist(), strict=True)
                    scalars = {f"loss/{task}": loss for task, loss in by_task}
                    self.fabric.log_dict({"loss/mean": mean, **scalars}, step=done)
                due = done % self.settings.save_every == 0 or done == steps or stopped.is_set()
                if keep is not None and due and save_state(keep, progress, trained, optimizer):
                    saved = done
                if stopped.is_set():
                    where = "; the same command goes on from there" if saved == done else ""
                    raise Interrupted(f"stopped after step {done} of {steps}{where}")

    def _step(
        self,
        passes: Iterator[tuple[dict[str, Tensor], Tensor]],
        targets: Mapping[str, Representations],
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, torch.nn.Parameter],
    ) -> Tensor:
        """Gradients of one step; returns each task's loss (tasks,) on the CPU."""
        optimizer.zero_grad(set_to_none=True)
        if self.mixture is not None:
            self.mixture.write(self.model.tower)
            for parameter in self.model.tower.mergeable().values():
                parameter.requires_grad_(True)
        scale = FP16_SCALE if self.dtype == torch.float16 else 1.0
        losses = []
        for _ in self.groups:
            entry, inputs = next(passes)
            expert = {
                name: torch.cat([targets[task][name][rows] for task, rows in entry.items()]).to(
                    self.fabric.device, non_blocking=True
                )
                for name in next(iter(targets.values()))
            }
            inputs = inputs.to(self.fabric.device, non_blocking=True)
            names = [task for task, rows in entry.items() for _ in rows]
            with self.model.for_task(names, len(inputs)):
                student = self.loss.read(partial(self.prefix.features, inputs))
            group = self.loss.of(student, expert, len(entry))
            if group.requires_grad:  # a budget may leave all tasks of a group without an edit
                (group.sum() * scale).backward()
            losses.append(group.detach())
        if self.mixture is not None:
            self.mixture.collect_gradient(self.model.tower)
        result = torch.cat(losses)
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        if scale != 1.0:
            for gradient in gradients:
                gradient.div_(scale)
        if self.fabric.world_size > 1:
            self._average([result, *gradients])
        return result.cpu().float()

    def _average(self, tensors: list[Tensor]) -> None:
        """In place, the mean over processes, which see equal shares of every task's batch."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        mean = self.fabric.all_reduce(flat, reduce_op="mean")
        assert isinstance(mean, Tensor)
        parts = mean.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _expert_features(expert: VisionTower, images: Tensor, after_block: AfterBlock | None) -> Tensor:
    """Image features; the last block works on the class token alone if nobody looks on."""
    states = expert.embed(images)
    return expert.features_from(states, 0, after_block, class_token_alone=after_block is None)
