"""``fusion_bench method=intervmerge``: merge, repair, report.

Surgery and SurgeryV2 are configs of the same algorithm.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from fusion_bench import BaseModelPool
from fusion_bench.constants import RuntimeConstants
from rich.console import Console
from safetensors import SafetensorError
from torch.utils.data import Subset

from ..config import ConfigError, Json
from ..data import RunFolder, interruptible
from ..distillation.loop import Distillation, distill
from ..encoders.base import VisionTower
from ..files import cache_root
from ..model.artifact import check_place
from ..model.model import InterventionModel
from ..model.protocols import Experts, Repair
from ..results import ImagesUsed, Result
from ..solving.fit_router import fit_router
from ..solving.recalibrate import recalibrate
from ..solving.solve import budget_in_numbers, solve
from .calibrate import (
    CalibrationAlgorithm,
    Merged,
    WeightsAlgorithm,
    merge,
    merge_name,
    nested_in,
    weights_method,
)
from .host import (
    Method,
    after_evaluation,
    attach,
    check_task_pool,
    has_task_pool,
    host_in_the_log,
    name_models,
    one_line,
    plain,
)
from .hosted import HostedInterventionModel, OneTask
from .pools import ExpertPool, prepare_task_pool
from .records import (
    announce,
    diagnose,
    diagnosis_table,
    fitting_task_pool,
    method_name,
    repair_result,
    saved_images,
    summarize_at_exit,
)
from .settings import MethodSettings

log = logging.getLogger(__name__)

DIAGNOSED_IMAGES = 256


@dataclass(frozen=True)
class Repaired:
    """A repaired model, its training, and the settings that decided the result as plain values."""

    model: InterventionModel
    done: Distillation
    settings: Json


class IntervMergeAlgorithm(Method, Repair):
    """Merge experts and repair the merged encoder with task-specific edits.

    Its settings are those of ``MethodSettings``.
    """

    Settings = MethodSettings
    _weights: WeightsAlgorithm | None  # gives the merged encoder other weights, if the base does

    @one_line
    def __init__(self, interventions: object = None, base: object = None, **settings: object):
        super().__init__(interventions=interventions, base=base, **settings)
        changes = {"base": nested_in(self.settings.base, self.settings)}
        if RuntimeConstants.debug:  # fast_dev_run=true
            changes["steps"] = min(self.settings.steps, 2)
        self.settings = self.settings.model_copy(update=changes)
        own, self._weights = self.settings, None
        if own.extend is None:  # else nothing is merged
            if own.coefficients is None:
                self._weights = weights_method(own.base)
            if own.recalibrate and not isinstance(self._weights, CalibrationAlgorithm):
                allowed = "false, or method@method.base=calibration"
                raise ConfigError("recalibrate", "the base does not calibrate", allowed)

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> InterventionModel:
        """The pool's experts merged and repaired; task pools evaluate the model task by task.

        Raises:
            ConfigError: a setting or a pool that does not fit, in one line.
            DistillationError: the loss is not finite.
        """
        pool = ExpertPool(modelpool)
        if self.settings.save_to is not None:  # refused before the training, not after it
            logs, folder = Path(self.log_dir or ".").resolve(), self._artifact_folder()
            if folder.resolve() in (logs, *logs.parents):
                allowed = "'{log_dir}/intervmerge', or a folder elsewhere"
                raise ConfigError("save_to", f"{folder} is where the run's logs go", allowed)
            check_place(folder, "save_to")
        if self.settings.extend is not None:
            model = HostedInterventionModel.from_pretrained(Path(self.settings.extend))
            check_task_pool(self._program, pool.family, {*model.tasks, *pool.tasks})
            prepare_task_pool(self._program)
            merged, repaired = None, self._extend(pool, model)
        else:
            check_task_pool(self._program, pool.family, pool.tasks)
            self.look_ahead(pool, pool.first_tower())
            self._announce(pool)
            prepare_task_pool(self._program)
            with interruptible("merging the experts"):
                merged = self.merge(pool)
            repaired = self._repair(pool, merged)
        with interruptible("measuring the repair", repaired.done.states):
            result = self._report(pool, repaired, merged)
        self._add_metadata(pool, repaired, result)
        if self.settings.save_to is not None and self.fabric.is_global_zero:
            self._save(repaired)
        references: dict[str, object] = {}
        if self.settings.references:
            references |= {} if merged is None else merged.models()
            if merged is None or not self.settings.recalibrate:  # else its own is another
                references[str(result.base)] = OneTask(repaired.model, merged=True)
        after_evaluation(self._program, repaired.done.clear, references)
        summarize_at_exit(self.log_dir)
        return repaired.model

    # -- as one of a comparison's repairs --------------------------------------------------------

    def seeded(self, pool: Experts) -> bool:
        """A seed decides initial edits, the order of a training's images, and which are taken."""
        data = self.settings.data
        sizes = [len(pool.images(task, data.split)) for task in pool.tasks]
        every_image = data.fraction == 1 and (data.images is None or data.images >= max(sizes))
        sites = self.settings.interventions.values()
        drawn = any(config.init == "reference" for config in sites)
        return drawn or self.settings.steps > 0 or not every_image

    def look_ahead(self, pool: Experts, tower: VisionTower) -> None:
        """Refuse edits that do not fit the encoder, and images that are not found."""
        tower.placements(self.settings.interventions)
        for task in pool.tasks:
            pool.images(task, self.settings.data.split)

    def merge(self, pool: ExpertPool) -> Merged:
        """The merged encoder that the settings name."""
        settings, keep = self.settings, self.settings.resume == "auto"
        how = settings.base, settings.coefficients
        return merge(pool, *how, self.fabric, self._program, keep)

    def repair(self, pool: Any, merged: VisionTower) -> InterventionModel:
        """Find edits for a merged encoder, which the model takes over.

        If ``coefficients`` are set the merge is made anew, by these; if the base calibrates, the
        merge is calibrated first.
        """
        made = Merged("merged", merged)
        if self.settings.coefficients is not None:
            made = self.merge(pool)
        elif self._weights is not None:
            made = attach(self._weights, self._program, self.fabric).over(pool, made)
        repaired = self._repair(pool, made)
        # the features are large, and of no use to a comparison
        self._last = replace(repaired, done=replace(repaired.done, expert_features={}))
        return repaired.model

    def record(self, model: Any) -> Result:
        # the base among the settings is not the one that a comparison repaired
        last = replace(self._last, model=model, settings=self._last.settings | {"base": None})
        images = [*self._images_below(), self._images_used(solves(model))]
        return self._result(last, images)

    def clear(self) -> None:
        self._last.done.clear()

    # -- the repair ------------------------------------------------------------------------------

    def _repair(self, pool: ExpertPool, merged: Merged) -> Repaired:
        settings, mixture, tower = self.settings, merged.mixture, merged.tower
        if settings.recalibrate and settings.references:
            tower = copy.deepcopy(tower)  # the calibrated one is evaluated too
        model = HostedInterventionModel(tower, pool.tasks, settings.interventions, settings.seed)
        repaired = self._train(pool, model, pool.tasks, merged)
        if mixture is not None:
            model.metadata["coefficients"] = {"coefficients": mixture.coefficients.detach().cpu()}
        return repaired

    def _extend(self, pool: ExpertPool, model: InterventionModel) -> Repaired:
        """Add the pool's new tasks to a saved model; its merged encoder and tasks stay."""
        folder = self.settings.extend
        new = [task for task in pool.tasks if task not in model.tasks]
        if not new:
            raise ConfigError("extend", f"{folder} has every task of the pool already", "new tasks")
        if self.settings.router is not None and model.router is None:
            problem = f"{folder} has none, and its tasks' images are not at hand"
            raise ConfigError("router", problem, "null; fit_router(model, images) in Python")
        if not solves(model) and not self.settings.steps:
            problem = "0, but the saved model's edits are trained"
            raise ConfigError("steps", problem, "1 or more, or no `extend`")
        for task in new:
            model.add_task(task)
        return self._train(pool, model, new, None)

    def _fit_router(
        self, pool: ExpertPool, model: InterventionModel, done: Distillation, router: Any
    ) -> None:
        """Fit the router to the images that the edits were found on."""
        data = self.settings.data
        started, home = time.perf_counter(), model.device
        images = {t: Subset(pool.images(t, data.split), rows) for t, rows in done.images.items()}
        model.to(self.fabric.device)
        with interruptible("fitting the router", done.states):
            seed, workers = self.settings.seed, data.num_workers
            fit_router(model, images, router, seed=seed, num_workers=workers)
        model.to(home)
        done.seconds = {**done.seconds, "routing": time.perf_counter() - started}

    def _train(
        self,
        pool: ExpertPool,
        model: InterventionModel,
        tasks: Sequence[str],
        merged: Merged | None,
    ) -> Repaired:
        """Solve the edits that the settings say are solved, train, round, and fit the router."""
        settings = self.settings
        experts = {task: partial(pool.tower, task) for task in tasks}
        images = {task: pool.images(task, settings.data.split) for task in tasks}
        described = self._describe(model, tasks)
        states, solved = None, None
        # nothing tells one live model from another
        if settings.resume == "auto" and not pool.pool.has_instance_models:
            run = self._identity(pool, model, tasks, described)
            states = RunFolder(cache_root() / "states" / run, run)
        more: Json = {"fabric": self.fabric, "states": states}
        if solves(model):
            solved = solve(model, experts, images, settings, **more)
        if solved is not None and merged is not None and settings.recalibrate:
            started, weights = time.perf_counter(), cast(CalibrationAlgorithm, self._weights)
            own = {"data": settings.data, "seed": settings.seed}  # the images of the edits
            how = weights.settings.model_copy(update=own)
            towers = cast(Merged, merged.below).tower, pool.tower("_pretrained_")
            recalibrate(model, *towers, experts, images, how, **more)
            solved.seconds["recalibrating"] = time.perf_counter() - started
        if solved is not None and not settings.steps:
            losses, parts = torch.empty(0, len(tasks)), (solved.images, solved.seconds)
            done = Distillation(losses, *parts, solved.expert_features, states=solved.states)
        else:
            trains = settings.coefficients is not None and settings.coefficients.train
            mixture = merged.mixture if merged is not None and trains else None
            more |= {"mixture": mixture, "cache": pool.features}
            done = distill(model, experts, images, settings, **more)
            done.seconds = (solved.seconds if solved else {}) | done.seconds
        try:
            model.store_as(settings.storage if settings.extend is None else model.storage)
        except ValueError as error:
            raise ConfigError("storage", str(error), "float32, int8") from None
        if model.router is not None:  # the tasks that it knows stay as they are
            self._fit_router(pool, model, done, None)
        elif settings.router is not None:
            self._fit_router(pool, model, done, settings.router)
        return Repaired(model, done, described)

    def _describe(self, model: InterventionModel, tasks: Sequence[str]) -> Json:
        """The settings that decide a result, as plain values."""
        settings, base = self.settings, plain(self.settings.base)
        described = {
            "interventions": {s: config.to_dict() for s, config in model.interventions.items()},
            # nothing more can be told of a method object
            "base": base if base is None or isinstance(base, Mapping) else repr(type(base)),
            "budget": budget_in_numbers(settings.budget, model, len(tasks)),
            "coefficients": settings.coefficients and settings.coefficients.to_dict(),
            "loss": settings.loss,
            "router": settings.router and settings.router.to_dict(),
            "data": settings.data.to_dict(),
            "optimizer": settings.optimizer,
            "seed": settings.seed,
        }
        described |= {} if settings.storage == "float32" else {"storage": settings.storage}
        return described | ({"recalibrate": True} if settings.recalibrate else {})

    def _identity(
        self, pool: ExpertPool, model: InterventionModel, tasks: Sequence[str], settings: Json
    ) -> str:
        """A digest of everything that the edits depend on."""
        facts = {
            "settings": settings | {"router": None},  # it is fitted when the edits are there
            "model_seed": model.seed,
            "steps": self.settings.steps,
            "merged": model.tower.digest(),
            **pool.identity(tasks, self.settings.data.split),
            "precision": str(getattr(self.fabric._precision, "precision", "")),
            "processes": self.fabric.world_size,
            "compile": self.settings.compile,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]

    def _announce(self, pool: ExpertPool) -> None:
        """Print what is going to be done; progress bars then show the time that is left."""
        settings, base, where, then = self.settings, self.settings.base, "method.base", ""
        while settings.coefficients is None and (weights := weights_method(base)) is not None:
            base, where, then = weights.base, f"{where}.base", f", then {weights.name}{then}"
        name = merge_name(pool, base, settings.coefficients, where)
        own = {"coefficients": "coefficients of its own", "merged": "the pool's merged model"}
        tasks = f"{len(pool.tasks)} experts ({', '.join(pool.tasks)})"
        how = {s: c.init == "regression" for s, c in settings.interventions.items()}
        edits = ", ".join(f"{site} ({'solved' if how[site] else 'trained'})" for site in how)
        budget = "" if settings.budget is None else f", budget {settings.budget}"
        budget += " numbers" * isinstance(settings.budget, int)
        images = self._images_used(any(how.values()))
        tested = " (transductive: the split that is tested)" * images.transductive
        if self.fabric.is_global_zero:
            announce(
                f"Merge: {tasks} by {own.get(name, name)}{then}",
                f"Repair: edits at {edits}{budget}",
                f"Images: {images.in_words()}{tested}",
            )

    # -- what is said of it ----------------------------------------------------------------------

    def _images_below(self) -> list[ImagesUsed]:
        """The images that the weights of the merged encoder are solved on, if they are."""
        return [] if self._weights is None else self._weights.images_used()

    def _images_used(self, solved: bool) -> ImagesUsed:
        """The images that the edits are found on."""
        data, steps = self.settings.data, self.settings.steps
        return ImagesUsed(
            split=data.split,
            fraction=data.fraction,
            at_most=data.images,
            solved=solved,
            steps=steps,
            batch_size=data.batch_size if steps else None,
            seed=self.settings.seed,
            # accuracies are measured on the test split
            transductive=data.split == "test",
        )

    def _result(self, repaired: Repaired, images: list[ImagesUsed], **more: object) -> Result:
        done = repaired.done
        return repair_result(
            repaired.model,
            repaired.settings,
            images,
            images_seen={task: len(rows) for task, rows in done.images.items()},
            resumed_at=done.resumed_at,
            final_loss=float(done.losses[-1].mean()) if len(done.losses) else None,
            losses=done.by_task(),
            seed=self.settings.seed,
            **more,
        )

    def _report(self, pool: ExpertPool, repaired: Repaired, merged: Merged | None) -> Result:
        """Print how close the model came to its experts, and write the run's results."""
        model, done = repaired.model, repaired.done
        alone = self._program is not None and not has_task_pool(self._program)
        rows, home = {}, model.device
        model.to(self.fabric.device)
        for task, seen in done.images.items():
            count = min(DIAGNOSED_IMAGES, len(seen))
            head = pool.head(task) if alone else None
            images = pool.images(task, self.settings.data.split)
            expert = done.expert_features[task][:count]
            rows[task] = diagnose(model, task, images, seen[:count], expert, head)
        model.to(home)  # a caller's images are where the pool's models were
        used = [self._images_used(solves(model))]
        if merged is None:
            base = model.metadata.get("base", "merged")
            used = [*saved_images(model), used[0].model_copy(update={"tasks": list(done.images)})]
        else:
            base, used = merged.name, [*self._images_below(), *used]
        result = self._result(
            repaired,
            used,
            base=base,
            seconds=sum(done.seconds.values()),
            seconds_by_part=done.seconds,
            features=rows,
        )
        result = result.model_copy(update={"method": method_name(result)})
        if alone and self.fabric.is_global_zero:
            console = Console()
            console.print("Image features against the experts', merged and repaired", style="bold")
            console.print(diagnosis_table(rows))
            named = fitting_task_pool(pool.tasks, pool.pool._models.get("_pretrained_"))
            console.print(f"For accuracies add a task pool: taskpool={named}")
        name = f"{result.base}/{result.method}/seed{result.seed}"
        self.write(pool.tasks, {name: result})
        name_models(self._program, {name: model})
        return result

    def _add_metadata(self, pool: ExpertPool, repaired: Repaired, result: Result) -> None:
        """Add to the model its CLIP, and what it was trained on, earlier trainings included."""
        metadata, about = repaired.model.metadata, pool.about()
        classes = (metadata.get("classes") or {}) | about.pop("classes", {})
        metadata |= about | ({"classes": classes} if classes else {})
        method = {"method": result.settings, "transductive": result.transductive}
        images = [one.model_dump(exclude_defaults=True) for one in result.images]
        if self.settings.extend is None:
            metadata |= {"base": result.base, "name": result.method, "images": images, **method}
            return
        before = metadata.get("images") or "images that are not known"
        metadata["images"] = [*([before] if isinstance(before, str) else before), images[-1]]
        metadata["transductive"] = metadata.get("transductive", False) or result.transductive
        added = {"tasks": list(repaired.done.images), **method}
        metadata["extended"] = [*metadata.get("extended", []), added]

    def _save(self, repaired: Repaired) -> None:
        folder, states = self._artifact_folder(), repaired.done.states
        try:
            with interruptible("saving the model", states):
                repaired.model.save_pretrained(folder)
        except (ConfigError, SafetensorError) as error:
            kept = states is not None and states.progress
            more = "; the training is kept, the same command goes on to the save" if kept else ""
            raise ConfigError("save_to", f"the model was not saved ({error}){more}") from None
        log.info("the model is saved in %s", folder)

    def _artifact_folder(self) -> Path:
        return Path(str(self.settings.save_to).format(log_dir=self.log_dir or "."))


def solves(model: InterventionModel) -> bool:
    """Whether any of a model's edits are solved in closed form."""
    return any(config.init == "regression" for config in model.interventions.values())
