"""``fusion_bench method=intervmerge``: merge, distil, report.

Surgery and SurgeryV2 are configs of the same algorithm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.constants import RuntimeConstants
from fusion_bench.mixins import LightningFabricMixin, SimpleProfilerMixin
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Subset

from ..config import ConfigError
from ..distillation.loop import Distillation, distill
from ..distillation.settings import make_optimizer
from ..distillation.states import StateFolder, interruptible
from ..encoders.base import VisionTower
from ..expert_cache import ExpertCache
from ..files import cache_root
from ..interventions.config import read_interventions
from ..merging import Mixture
from ..model.artifact import Storage, check_place
from ..model.model import InterventionModel
from ..model.protocols import Experts, Repair
from ..model.router import RouterSettings
from ..results import Images, Result, Results
from ..solving.fit_router import fit_router
from ..solving.solve import budget_in_numbers, solve
from .diagnosis import diagnose, table
from .experts import ExpertPool
from .host import check_task_pool, has_task_pool, plain, split_settings
from .hosted_models import HostedInterventionModel
from .hub import warn_if_unreachable
from .loggers import show
from .merge import merge_experts
from .records import base_name, images_used, method_name, remembered_images, repaired
from .screen import host_in_the_log, one_line
from .settings import MethodSettings

log = logging.getLogger(__name__)

DIAGNOSED_IMAGES = 256


class IntervMergeAlgorithm(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm, Repair):
    """Merge experts and repair the merged encoder by distilling task-specific edits.

    Args:
        interventions, base: as in ``MethodSettings``.
        settings: the other ones of ``MethodSettings``.

    Raises:
        ConfigError: a setting that does not exist, or not with that value.
    """

    Settings = MethodSettings

    @one_line
    def __init__(self, interventions: object = None, base: object = None, **settings: object):
        settings, host = split_settings(settings, interventions=interventions, base=base)
        super().__init__(**host)
        self.settings = MethodSettings.read(settings)
        self.interventions: dict[str, Any] = self.settings.interventions
        self.base: object = self.settings.base
        self.coefficients: Any = self.settings.coefficients
        self.data = self.settings.data
        sites = read_interventions(self.interventions).values()
        self._solves = any(config.init == "regression" for config in sites)
        self._draws = any(config.init == "reference" for config in sites)
        self._budget: int | None = None  # in numbers, once there is a model
        # refused now, not after the merge
        make_optimizer(self.settings.optimizer, [nn.Parameter(torch.zeros(1))])

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> InterventionModel:
        """Merge the pool's experts and train the edits.

        Returns:
            The model, which FusionBench's task pools evaluate task by task.

        Raises:
            ConfigError: a setting or a pool that does not fit, in one line.
            DistillationError: the loss is not finite.
        """
        pool = ExpertPool(modelpool)
        check_task_pool(self._program, pool.family)
        warn_if_unreachable(pool.pool._models.values())
        if self.settings.save_to is not None:
            self._check_writable(self._artifact_folder())
        if self.settings.extend is not None:
            model, done = self._extend(pool, Path(self.settings.extend))
        else:
            self.look_ahead(pool, pool.first_tower())
            with self.profile("merging"), interruptible("merging the experts"):
                merged, mixture = self.merge(pool)
            with self.profile("distillation"):
                model, done = self._repair(pool, merged, mixture)
        with interruptible("measuring the repair", done.states):
            report = self._report(pool, model, done)
        self._remember(pool, model, done, report)
        if self.settings.save_to is not None and self.fabric.is_global_zero:
            self._save(model, done)
        done.clear()
        return model

    def _save(self, model: InterventionModel, done: Distillation) -> None:
        folder = self._artifact_folder()
        try:
            with interruptible("saving the model", done.states):
                model.save_pretrained(folder)
        except (ConfigError, SafetensorError) as error:
            kept = done.states is not None and done.states.newest() is not None
            more = "; the training is kept, the same command goes on to the save" if kept else ""
            raise ConfigError("save_to", f"the model was not saved ({error}){more}") from None
        log.info("the model is saved in %s", folder)

    def _remember(
        self,
        pool: ExpertPool,
        model: InterventionModel,
        done: Distillation,
        result: Result,
    ) -> None:
        """Keep with the model its CLIP, and what it was trained on, earlier trainings included."""
        seen = model.metadata
        now = {"method": result.settings, "transductive": result.transductive}
        images = [one.model_dump(exclude_defaults=True) for one in result.images]
        about = pool.about()
        classes = (seen.get("classes") or {}) | about.pop("classes", {})
        seen |= about | ({"classes": classes} if classes else {})
        if self.settings.extend is None:
            seen |= {"base": result.base, "name": result.method, "images": images, **now}
            return
        before = seen.get("images") or "images that are not known"
        seen["images"] = [*([before] if isinstance(before, str) else before), images[-1]]
        seen["transductive"] = seen.get("transductive", False) or now["transductive"]
        seen["extended"] = [*seen.get("extended", []), {"tasks": list(done.images), **now}]

    def seeded(self, pool: Experts) -> bool:
        """A seed decides initial edits, the order of a training's images, and which are taken."""
        data = self.data
        sizes = [len(pool.images(task, data.split)) for task in pool.tasks]
        every_image = data.fraction == 1 and (data.images is None or data.images >= max(sizes))
        return self._draws or self.settings.steps > 0 or not every_image

    def look_ahead(self, pool: Experts, tower: VisionTower) -> None:
        """Refuse edits that do not fit the encoder, and images that are not found."""
        InterventionModel(tower, pool.tasks[:1], self.interventions)
        for task in pool.tasks:
            pool.images(task, self.data.split)

    def merge(self, pool: ExpertPool) -> tuple[VisionTower, Mixture | None]:
        """The merged encoder, and the mixture it came from where ``coefficients`` are set."""
        return merge_experts(
            pool,
            self.base,
            self.coefficients,
            self.fabric,
            self._program,
            keep=self.settings.resume == "auto",
        )

    def repair(self, pool: Any, merged: VisionTower) -> InterventionModel:
        """Train edits for a merged encoder, which the model takes over.

        Where ``coefficients`` are set the merge is made anew, by these.
        """
        mixture = None
        if self.coefficients is not None:
            merged, mixture = self.merge(pool)
        model, done = self._repair(pool, merged, mixture)
        self._done = replace(done, expert_features={})  # large, and of no use to a comparison
        return model

    def record(self, model: Any) -> Result:
        # the base among the settings is not the one that a comparison repaired
        own = self._settings(model) | {"base": None}
        return repaired(model, self._done, [self.images_used], own)

    def clear(self) -> None:
        self._done.clear()

    def _repair(
        self, pool: ExpertPool, merged: VisionTower, mixture: Mixture | None
    ) -> tuple[InterventionModel, Distillation]:
        seed = self.settings.seed
        model = HostedInterventionModel(merged, pool.tasks, self.interventions, seed)
        trained = mixture if self.coefficients is not None and self.coefficients.train else None
        done = self._train(pool, model, pool.tasks, trained)
        if mixture is not None:
            model.metadata["coefficients"] = {"coefficients": mixture.coefficients.detach().cpu()}
        self._store(model, self.settings.storage)
        if self.settings.router is not None:
            self._fit_router(pool, model, done, self.settings.router)
        return model, done

    def _extend(self, pool: ExpertPool, folder: Path) -> tuple[InterventionModel, Distillation]:
        """Add the pool's new tasks to a saved model; its merged encoder and tasks stay."""
        model = HostedInterventionModel.from_pretrained(folder)
        new = [task for task in pool.tasks if task not in model.tasks]
        if not new:
            raise ConfigError("extend", f"{folder} has every task of the pool already", "new tasks")
        if self.settings.router is not None and model.router is None:
            problem = f"{folder} has none, and its tasks' images are not at hand"
            raise ConfigError("router", problem, "null; fit_router(model, images) in Python")
        for task in new:
            model.add_task(task)
        done = self._train(pool, model, new, None)
        self._store(model, model.storage)
        if model.router is not None:  # the tasks that it knows stay as they are
            self._fit_router(pool, model, done, None)
        return model, done

    @staticmethod
    def _store(model: InterventionModel, storage: Storage) -> None:
        try:
            model.store_as(storage)
        except ValueError as error:
            raise ConfigError("storage", str(error), "float32, int8") from None

    def _fit_router(
        self,
        pool: ExpertPool,
        model: InterventionModel,
        done: Distillation,
        settings: RouterSettings | None,
    ) -> None:
        """Learn to tell the tasks, from the images that their edits were found on."""
        started, home = time.perf_counter(), model.device
        seen = {
            task: Subset(pool.images(task, self.data.split), images)
            for task, images in done.images.items()
        }
        workers = self.data.num_workers
        try:
            model.to(self.fabric.device)
            with interruptible("fitting the router", done.states):
                fit_router(model, seen, settings, seed=self.settings.seed, num_workers=workers)
        finally:
            model.to(home)
        done.seconds = {**done.seconds, "routing": time.perf_counter() - started}

    def _train(
        self,
        pool: ExpertPool,
        model: InterventionModel,
        tasks: Sequence[str],
        mixture: Mixture | None,
    ) -> Distillation:
        """Solve what the settings say is solved, then train."""
        settings, data = self.settings, self.data
        experts = {task: partial(pool.tower, task) for task in tasks}
        images = {task: pool.images(task, data.split) for task in tasks}
        self._budget = budget_in_numbers(settings.budget, model, len(tasks))
        run = self._identity(pool, model, tasks)
        # Nothing tells one live model from another, so their runs are not continued.
        resume = settings.resume == "auto" and not pool.pool.has_instance_models
        states = StateFolder(cache_root() / "states" / run, run) if resume else None
        solved = None
        self._solves = any(c.init == "regression" for c in model.interventions.values())
        if self.settings.extend is not None and not self._solves and not self._steps:
            raise ConfigError(
                "steps", "0, but the saved model's edits are trained", "1 or more, or no `extend`"
            )
        if self._solves:
            solved = solve(model, experts, images, settings, fabric=self.fabric, states=states)
            if not self._steps:
                return Distillation(
                    torch.empty(0, len(tasks)),
                    solved.images,
                    solved.seconds,
                    solved.expert_features,
                    states=solved.states,
                )
        done = distill(
            model,
            experts,
            images,
            settings.model_copy(update={"steps": self._steps}),
            mixture=mixture,
            fabric=self.fabric,
            states=states,
            cache=ExpertCache(cache_root() / "features") if settings.resume == "auto" else None,
        )
        if solved is not None:
            done.seconds = solved.seconds | done.seconds
        return done

    @property
    def images_used(self) -> Images:
        """Which images the edits are found on."""
        return images_used(self.settings, self._steps, self._solves)

    @property
    def _steps(self) -> int:
        return min(self.settings.steps, 2) if RuntimeConstants.debug else self.settings.steps

    # -- around the trainer ------------------------------------------------------------------------

    def _identity(self, pool: ExpertPool, model: InterventionModel, tasks: Sequence[str]) -> str:
        """A digest of everything the trained numbers depend on."""
        settings = self._settings(model)
        del settings["router"]  # it is fitted when the edits are there
        facts = {
            "settings": settings,
            "model_seed": model.seed,
            "steps": self._steps,
            "merged": model.tower.digest(),
            "experts": {task: pool.identity(task) for task in tasks},
            "images": {task: pool.images_identity(task, self.data.split) for task in tasks},
            "precision": str(getattr(self.fabric._precision, "precision", "")),
            "processes": self.fabric.world_size,
            "compile": self.settings.compile,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]

    def _settings(self, model: InterventionModel) -> dict[str, object]:
        return {
            "interventions": self.interventions
            if self.settings.extend is None  # else the saved model's own hold
            else {site: config.to_dict() for site, config in model.interventions.items()},
            "base": self._base_settings(),
            "budget": self._budget,
            "coefficients": self.coefficients and self.coefficients.to_dict(),
            "loss": self.settings.loss,
            "router": self.settings.router and self.settings.router.to_dict(),
            "data": self.data.to_dict(),
            "optimizer": self.settings.optimizer,
            "seed": self.settings.seed,
            **({} if self.settings.storage == "float32" else {"storage": self.settings.storage}),
        }

    def _base_settings(self) -> Any:
        """The base's config; of a method object nothing but its kind can be told."""
        if self.base is None or isinstance(self.base, Mapping):
            return plain(self.base)
        return repr(type(self.base))

    def _base_name(self, pool: ExpertPool, model: InterventionModel) -> str:
        if self.settings.extend is not None:
            return model.metadata.get("base", "merged")
        if self.coefficients is not None:
            return "coefficients"
        return "merged" if pool.pool.has_merged else base_name(self.base)

    def _report(self, pool: ExpertPool, model: InterventionModel, done: Distillation) -> Result:
        """Print how far the model got; keep the whole story beside FusionBench's report."""
        dummy = self._program is not None and not has_task_pool(self._program)
        rows, home = {}, model.device
        model.to(self.fabric.device)
        for task, seen in done.images.items():
            count = min(DIAGNOSED_IMAGES, len(seen))
            head = pool.head(task) if dummy else None
            expert = done.expert_features[task][:count]
            images = pool.images(task, self.data.split)
            rows[task] = diagnose(model, task, images, seen[:count], expert, head)
        model.to(home)  # a caller's images are where the pool's models were
        used = [self.images_used]
        if self.settings.extend is not None:
            new = used[0].model_copy(update={"tasks": list(done.images)})
            used = [*remembered_images(model), new]
        result = repaired(
            model,
            done,
            used,
            self._settings(model),
            base=self._base_name(pool, model),
            seconds=sum(done.seconds.values()),
            seconds_by_part=done.seconds,
            features=rows,
        )
        result = result.model_copy(update={"method": method_name(result)})
        if self.fabric.is_global_zero:
            console = Console()
            console.print("Image features against the experts', merged and repaired", style="bold")
            console.print(table(rows))
            extra, words = result.extra_parameters, self.images_used.in_words()
            console.print(f"{extra:,} extra parameters, found on {words}.")
            if dummy:
                console.print(f"For accuracies add a task pool: {_suggested_task_pool()}")
            name = f"{result.base}/{result.method}/seed{result.seed}"
            Results(tasks=list(pool.tasks), models={name: result}).write(self.log_dir)
        show(self.fabric, [result])
        return result

    def _artifact_folder(self) -> Path:
        return Path(str(self.settings.save_to).format(log_dir=self.log_dir or "."))

    def _check_writable(self, folder: Path) -> None:
        """Say so before the training, not after it."""
        logs = Path(self.log_dir or ".").resolve()
        if folder.resolve() in (logs, *logs.parents):
            allowed = "'{log_dir}/intervmerge', or a folder elsewhere"
            raise ConfigError("save_to", f"{folder} is where the run's logs go", allowed)
        check_place(folder, "save_to")


def _suggested_task_pool() -> str:
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        chosen = str(HydraConfig.get().runtime.choices.get("modelpool", ""))
        if chosen and "/" not in chosen:
            return f"taskpool={chosen}"
    return "taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8"
