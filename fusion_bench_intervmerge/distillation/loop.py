"""The one trainer: edits (and coefficients) move until the features match the experts'."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..checkpoint import Interrupted, Progress, StateFolder, interruptible, stop_requested
from ..encoders import VisionTower, check_expert
from ..encoders.base import AfterBlock
from ..errors import ConfigError
from ..expert_cache import ExpertCache
from ..images import Datasets
from ..merging import Mixture
from ..model import InterventionModel
from ..precision import computing_dtype
from ..prefix import prefix_of
from ..progress import bar
from .losses import LOSSES, Representations
from .memory import keep_freed_memory
from .optimizer import make_optimizer
from .schedule import Schedule
from .settings import DistillSettings
from .store import ImageStore

log = logging.getLogger(__name__)

Experts = Mapping[str, Callable[[], VisionTower]]

# fp16 gradients of a mean over thousands of features would round to zero
FP16_SCALE = 2.0**12
LOG_EVERY = 10  # steps between two entries in the logs


class DistillationError(RuntimeError):
    """Training cannot go on; the message says what was kept, if anything was."""


@dataclass
class Distillation:
    """What a run did.

    Attributes:
        losses: (steps, tasks), each task's loss at each step.
        images: task -> dataset indices of the images seen, in the order of first use.
        seconds: wall-clock time of ``features`` (reading images, experts' features) and ``steps``.
        expert_features: task -> (images seen, projection_dim).
        resumed_at: the step a stopped run went on from, 0 for a fresh one.
        states: the run's states on disk, if it kept any; see ``clear``.
    """

    losses: Tensor
    images: dict[str, list[int]]
    seconds: dict[str, float]
    expert_features: dict[str, Tensor]
    resumed_at: int = 0
    states: StateFolder | None = None

    def clear(self) -> None:
        """Remove the run's states from the disk, once its result is kept elsewhere.

        Until then the same call finds the finished training and returns at once.
        """
        if self.states is not None:
            self.states.clear()

    def by_task(self) -> dict[str, list[float]]:
        """Task -> its loss at each step, for a report; empty where nothing was trained."""
        if not len(self.losses):
            return {}
        return {
            task: [round(float(loss), 6) for loss in self.losses[:, column]]
            for column, task in enumerate(self.images)
        }


def distill(
    model: InterventionModel,
    experts: Experts,
    images: Datasets,
    settings: DistillSettings | None = None,
    *,
    mixture: Mixture | None = None,
    fabric: L.Fabric | None = None,
    states: StateFolder | None = None,
    cache: ExpertCache | None = None,
    **keywords: object,
) -> Distillation:
    """Train a model's edits by distillation, without labels (eq 3.2 of the paper).

    Each step every task shows one batch of its images; the loss is the sum over tasks of the mean
    L1 between the repaired encoder's image features and the expert's. With frozen coefficients no
    term depends on another task's edits, so one optimizer over all of them gives the same numbers
    as one task after the other.

    Args:
        model: the model to train, in place.
        experts: task -> function that loads the expert; one expert is in memory at a time. The
            tasks trained are these; others of the model stay as they are.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        settings: how, as the method's config file says it.
        mixture: merging coefficients to train along with the edits.
        fabric: device, precision, processes and loggers; one device by default.
        states: where to keep the state of a run that may be stopped; None: nowhere. It is kept
            after the last step as well, until ``Distillation.clear``.
        cache: where experts' representations are kept for the next method; None: nowhere.
        keywords: in place of ``settings`` its fields, and those of its ``data``: ``steps=200,
            batch_size=8``.

    Returns:
        Losses, images seen, seconds, and the experts' features.

    Raises:
        ConfigError: settings that do not fit.
        DistillationError: the loss is not finite; with ``states`` the last good one is kept.
        Interrupted: on Ctrl-C; while it trains, after the step's end and with its state kept. A
            second Ctrl-C does not wait for that.
    """
    settings = DistillSettings.of(settings, keywords)
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    data, tasks = settings.data, list(experts)
    for task in tasks:
        model.check_task(task)
        if task not in images:
            raise ConfigError("modelpool", f"no images for task {task!r}")
    schedules = {
        task: Schedule(
            task,
            len(images[task]),  # type: ignore[arg-type]
            steps=settings.steps,
            batch_size=data.batch_size,
            fraction=data.fraction,
            at_most=data.images,
            seed=settings.seed,
        )
        for task in tasks
    }
    trainer = _Trainer(model, tasks, schedules, settings, mixture, fabric)
    store = ImageStore(images, schedules, data.cache_gb * 2**30, data.num_workers)
    with ExitStack() as stack:
        stack.enter_context(trainer.on_device())
        if fabric.device.type == "cpu":
            stack.enter_context(keep_freed_memory())
        started = time.perf_counter()
        with interruptible("reading the experts' features", states):
            targets = trainer.read_experts(experts, store, cache)
        ready = time.perf_counter()
        trained = trainer.trained()
        if not trained:
            raise ConfigError(
                "interventions",
                "there are no edits to train",
                "other inits, or solve(...) before it where init is regression",
            )
        optim = make_optimizer(settings.optimizer, list(trained.values()))
        progress = Progress(0, torch.empty(0, len(tasks)))
        if states is not None:
            progress = states.load(progress, settings.steps, trained, optim)
        if progress.step:
            log.info("going on from step %d of %d", progress.step, settings.steps)
        resumed_at = progress.step
        with interruptible("training", states):
            trainer.run(optim, trained, store, targets, progress, states)
        finished = time.perf_counter()
    if mixture is not None:
        mixture.write(model.tower)
    return Distillation(
        losses=progress.losses,
        images={task: schedule.unique for task, schedule in schedules.items()},
        seconds={"features": ready - started, "steps": finished - ready},
        expert_features={task: t["output"].float() for task, t in targets.items()},
        resumed_at=resumed_at,
        states=states if fabric.is_global_zero else None,
    )


class _Trainer:
    """The parts of a run that share the model, the device and the precision."""

    def __init__(
        self,
        model: InterventionModel,
        tasks: list[str],
        schedules: Mapping[str, Schedule],
        settings: DistillSettings,
        mixture: Mixture | None,
        fabric: L.Fabric,
    ):
        self.model, self.tasks, self.schedules = model, tasks, schedules
        self.settings = settings
        self.loss = LOSSES[settings.loss]
        self.mixture, self.fabric = mixture, fabric
        self.dtype = computing_dtype(fabric)
        self.prefix = prefix_of(model, moving=mixture is not None, blocks=self.loss.reads_blocks)
        batch = next(iter(schedules.values())).rows.shape[1]
        self.mine = slice(fabric.global_rank, batch, fabric.world_size)
        if batch % fabric.world_size:
            raise ConfigError(
                "data.batch_size",
                f"{batch} images do not divide among {fabric.world_size} processes",
                f"a multiple of {fabric.world_size}",
            )
        self.groups = self._groups(batch // fabric.world_size)

    def _groups(self, images_per_task: int) -> list[list[str]]:
        """Tasks that share a forward pass: as many as keep the activations within bounds.

        Whatever the grouping, the numbers are the same; larger passes only amortise overheads.
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
        """The blocks compiled, where the settings say so; afterwards as they were."""
        tower, start = self.model.tower, getattr(self.prefix, "first", 0)
        modules = [tower.block(b) for b in range(start, tower.num_blocks)]
        modules = modules if self.settings.compile else []
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
        model, device = self.model, self.fabric.device
        home = model.tower.device
        model.to(device)
        if self.mixture is not None:
            self.mixture.to_device(device)
        # What is trained is never kept in less than fp32.
        moving = [*self.trained().values()] if self.dtype == torch.float64 else []
        types = [parameter.dtype for parameter in moving]
        try:
            for parameter in moving:
                parameter.data = parameter.data.double()
            with model.tower.in_dtype(self.dtype), model.tower.fused_activations():
                yield
        finally:
            for parameter, dtype in zip(moving, types, strict=True):
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
            model.tower.requires_grad_(False)
            model.to(home)
            if self.mixture is not None:
                self.mixture.to_device(home)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Everything that moves, by name."""
        parameters = {
            f"{task}.{name}": parameter
            for task in self.tasks
            for name, parameter in self.model.edits[task].named_parameters()
        }
        if self.mixture is not None:
            parameters["coefficients"] = self.mixture.coefficients
        return parameters

    # -- before the loop ---------------------------------------------------------------------------

    def read_experts(
        self, experts: Experts, store: ImageStore, cache: ExpertCache | None
    ) -> dict[str, Representations]:
        """The experts' representations of every image seen, one expert in memory at a time."""
        targets = {}
        # On a CPU the widest tensors should be small enough for freed memory to be kept.
        at_once = 32 if self.fabric.device.type == "cpu" else 64
        total = sum(len(self.schedules[task].unique) for task in self.tasks)
        with bar(self.fabric, "experts' features", total) as shown:
            for task in self.tasks:
                expert = experts[task]()
                check_expert(task, expert, self.model.tower)
                expert = expert.to(self.fabric.device).eval()
                with torch.no_grad(), expert.in_dtype(self.dtype), expert.fused_activations():
                    targets[task] = self._representations(task, expert, store, at_once, cache)
                shown.update(len(self.schedules[task].unique))
                del expert
        return targets

    def _representations(
        self,
        task: str,
        expert: VisionTower,
        store: ImageStore,
        at_once: int,
        cache: ExpertCache | None,
    ) -> Representations:
        """One expert's, from the cache where it has them."""
        if cache is None:
            return self._read(task, expert, store, at_once)
        seen = self.schedules[task].unique
        key = cache.key(expert.digest(), seen, at_once, self.dtype, self.settings.loss)
        kept, pixels = cache.get(key), hashlib.sha256()
        found = self._read(task, expert if kept is None else None, store, at_once, pixels)
        if kept is not None:
            if kept[1] == pixels.hexdigest():
                return kept[0]
            found = self._read(task, expert, store, at_once)
        cache.put(key, found, pixels.hexdigest())
        return found

    def _read(
        self,
        task: str,
        expert: VisionTower | None,
        store: ImageStore,
        at_once: int,
        digest: Any = None,
    ) -> Representations:
        """Read a task's images, for the loop and, where they are given, an expert and a digest."""
        parts: list[Representations] = []
        for _, images in store.first_pass(task, at_once, self.prefix.of):
            if digest is not None:
                digest.update(images.contiguous().numpy())
            if expert is not None:
                pixels = images.to(self.fabric.device, self.dtype)
                read = self.loss.read(partial(_expert_features, expert, pixels))
                parts.append({name: tensor.cpu() for name, tensor in read.items()})
        names = parts[0] if parts else {}
        return {n: torch.cat([p[n] for p in parts]) for n in names}

    # -- the loop ----------------------------------------------------------------------------------

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, torch.nn.Parameter],
        store: ImageStore,
        targets: Mapping[str, Representations],
        progress: Progress,
        states: StateFolder | None,
    ) -> None:
        """Steps from ``progress.step`` to the end of the schedule; ``progress`` is kept current."""
        steps = len(self.schedules[self.tasks[0]].rows)
        plan = [
            {task: self.schedules[task].rows[step][self.mine] for task in group}
            for step in range(progress.step, steps)
            for group in self.groups
        ]
        passes = zip(plan, store.stream(plan, self.prefix.of), strict=True)
        history = list(progress.losses)
        keep = states if self.fabric.is_global_zero else None
        saved = progress.step

        def current(step: int) -> Progress:
            progress.step, progress.losses = (
                step,
                torch.stack(history) if history else progress.losses,
            )
            return progress

        with (
            stop_requested() as stopped,
            self.compiled(),
            bar(self.fabric, "distillation", steps, progress.step) as shown,
        ):
            for step in range(progress.step, steps):
                losses = self._step(passes, targets, optimizer, trained)
                if not torch.isfinite(losses).all():
                    bad = self.tasks[int((~torch.isfinite(losses)).nonzero()[0])]
                    if keep is not None and step > saved:
                        keep.save(current(step), trained, optimizer)
                    where = ""
                    if keep is not None and step > 0:
                        where = f"; the state before it is kept in {keep.folder}"
                    raise DistillationError(
                        f"the loss of task {bad!r} is not finite at step {step}{where}; "
                        "a smaller optimizer.lr may help"
                    )
                optimizer.step()
                history.append(losses)
                mean = float(losses.mean())
                shown.set_postfix_str(f"loss {mean:.4f}", refresh=False)
                shown.update()
                if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                    scalars = {
                        f"loss/{t}": float(v) for t, v in zip(self.tasks, losses, strict=True)
                    }
                    self.fabric.log_dict({"loss/mean": mean, **scalars}, step=step + 1)
                due = (
                    (step + 1) % self.settings.save_every == 0
                    or step + 1 == steps
                    or stopped.is_set()
                )
                if keep is not None and due:
                    keep.save(current(step + 1), trained, optimizer)
                    saved = step + 1
                if stopped.is_set():
                    current(step + 1)
                    kept = keep is not None and keep.newest() == step + 1
                    where = "; the same command goes on from there" if kept else ""
                    raise Interrupted(f"stopped after step {step + 1} of {steps}{where}")
        current(steps)

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
            student = self._student(entry, inputs.to(self.fabric.device, non_blocking=True))
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
            result = self._average(gradients, result)
        return result.cpu().float()

    def _student(self, entry: Mapping[str, Tensor], inputs: Tensor) -> Representations:
        names = [task for task, rows in entry.items() for _ in rows]
        with self.model.for_task(names, len(inputs)):
            return self.loss.read(partial(self.prefix.features, inputs))

    def _average(self, gradients: list[Tensor], losses: Tensor) -> Tensor:
        """Means over the processes: each saw an equal share of every task's batch."""
        flat = torch.cat([losses, *(g.flatten() for g in gradients)])
        reduced: Any = self.fabric.all_reduce(flat, reduce_op="mean")
        parts = reduced.split([losses.numel(), *(g.numel() for g in gradients)])
        for gradient, part in zip(gradients, parts[1:], strict=True):
            gradient.copy_(part.view_as(gradient))
        return parts[0]


def _expert_features(expert: VisionTower, images: Tensor, after_block: AfterBlock | None) -> Tensor:
    """Image features; the last block works on the class token alone where nobody looks on."""
    states = expert.embed(images)
    return expert.features_from(states, 0, after_block, class_token_alone=after_block is None)
