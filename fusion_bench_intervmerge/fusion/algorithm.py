"""``fusion_bench method=intervmerge``: merge, distil, report.

Surgery and SurgeryV2 are configs of the same algorithm.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.constants import RuntimeConstants
from fusion_bench.mixins import LightningFabricMixin, SimpleProfilerMixin
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from ..artifact import check_place
from ..cache import cache_root
from ..checkpoint import interruptible
from ..coefficients import (
    Mixture,
    initial_coefficients,
    task_vector,
    trim,
)
from ..distillation import Distillation, MethodSettings, distill
from ..encoders import VisionTower
from ..errors import ConfigError
from ..expert_cache import ExpertCache
from ..interventions import read_interventions
from ..model import InterventionModel
from ..results import Images, Result, Results
from ..settings import shown
from ..solving import solve
from .base_merge import run_adamerging, run_base
from .diagnosis import diagnose, table
from .experts import ExpertPool
from .hub import warn_if_unreachable
from .loggers import show
from .program import HOST_KEYS, check_arguments, check_family, has_task_pool, plain, split_settings
from .records import base_name, images_used, method_name, remembered_images, repaired
from .screen import host_in_the_log, one_line

log = logging.getLogger(__name__)

DIAGNOSED_IMAGES = 256
MAX_RATE = 1000  # beyond it no learning rate is meant


class IntervMergeAlgorithm(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """Merge experts and repair the merged encoder by distilling task-specific edits.

    Args:
        interventions, base: as in ``MethodSettings``.
        settings: the other ones of ``MethodSettings``.

    Raises:
        ConfigError: a setting that does not exist, or not with that value.
    """

    Settings = MethodSettings

    @one_line
    def __init__(self, interventions: Any = None, base: Any = None, **settings: Any):
        settings, host = split_settings(settings, interventions=interventions, base=base)
        super().__init__(**host)
        self.settings = MethodSettings.read(settings)
        self.interventions: dict[str, Any] = self.settings.interventions
        self.base: Any = self.settings.base
        self.coefficients: Any = self.settings.coefficients
        self.data = self.settings.data
        sites = read_interventions(self.interventions).values()
        self._solves = any(config.init == "regression" for config in sites)
        self._make_optimizer([nn.Parameter(torch.zeros(1))])  # refused now, not after the merge

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
        check_family(self._program, pool.family)
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
                model, done = self.repair(pool, merged, mixture)
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

    def look_ahead(self, pool: ExpertPool, tower: VisionTower) -> None:
        """Ask for what the training will need, so that what is missing is said before the merge.

        Args:
            pool: the experts and their images.
            tower: one of the pool's; it is used up.

        Raises:
            ConfigError: edits that do not fit the encoder, or images that are not found.
        """
        InterventionModel(tower, pool.tasks[:1], self.interventions)
        for task in pool.tasks:
            pool.images(task, self.data.split)

    def merge(self, pool: ExpertPool) -> tuple[VisionTower, Mixture | None]:
        """The merged encoder, and the mixture it came from where ``coefficients`` are set."""
        if self.coefficients is not None:
            return self._mix(pool)
        if pool.pool.has_merged:
            log.info("the pool has a merged model: it is repaired, and `base` is not run")
            return pool.tower("_merged_"), None
        if self.base is None:
            raise ConfigError("base", "nothing merges the experts", "a FusionBench method")
        try:
            model = run_base(self.base, pool.pool, self.fabric, self._program)
        except (RuntimeError, ValueError, KeyError):
            pool.check_shapes()  # the likeliest reason, and the method's own words for it are many
            raise
        return pool.wrap(model.to("cpu")), None

    def repair(
        self, pool: ExpertPool, merged: VisionTower, mixture: Mixture | None = None
    ) -> tuple[InterventionModel, Distillation]:
        """Train edits for a merged encoder, which the model takes over."""
        model = InterventionModel(merged, pool.tasks, self.interventions, self.settings.seed)
        trained = mixture if self.coefficients is not None and self.coefficients.train else None
        done = self._train(pool, model, pool.tasks, trained)
        if mixture is not None:
            model.metadata["coefficients"] = {"coefficients": mixture.coefficients.detach().cpu()}
        return model, done

    def _extend(self, pool: ExpertPool, folder: Path) -> tuple[InterventionModel, Distillation]:
        """Add the pool's new tasks to a saved model; its merged encoder and tasks stay."""
        model = InterventionModel.from_pretrained(folder)
        new = [task for task in pool.tasks if task not in model.tasks]
        if not new:
            raise ConfigError("extend", f"{folder} has every task of the pool already", "new tasks")
        for task in new:
            model.add_task(task)
        return model, self._train(pool, model, new, None)

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
        run = self._identity(pool, model, tasks)
        # Nothing tells one live model from another, so their runs are not continued.
        resume = settings.resume == "auto" and not pool.pool.has_instance_models
        common: dict[str, Any] = {
            "fraction": data.fraction,
            "at_most": data.images,
            "seed": settings.seed,
            "num_workers": data.num_workers,
            "cache_gb": data.cache_gb,
            "fabric": self.fabric,
            "state_folder": cache_root() / "states" / run if resume else None,
            "run": run,
        }
        solved = None
        self._solves = any(c.init == "regression" for c in model.interventions.values())
        if self.settings.extend is not None and not self._solves and not self._steps:
            raise ConfigError(
                "steps", "0, but the saved model's edits are trained", "1 or more, or no `extend`"
            )
        if self._solves:
            solved = solve(model, experts, images, budget=settings.budget, **common)
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
            steps=self._steps,
            batch_size=data.batch_size,
            compile=settings.compile,
            loss=settings.loss,
            optimizer=self._make_optimizer,
            mixture=mixture,
            save_every=settings.save_every,
            cache=ExpertCache(cache_root() / "features") if settings.resume == "auto" else None,
            **common,
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

    # -- merging -----------------------------------------------------------------------------------

    def _mix(self, pool: ExpertPool) -> tuple[VisionTower, Mixture]:
        settings = self.coefficients
        tower = pool.tower("_pretrained_")
        theta0 = [p.detach().clone() for p in tower.mergeable().values()]
        if settings.init == "base":
            start = run_adamerging(
                self.base,
                pool.pool,
                self.fabric,
                self._program,
                keep=self.settings.resume == "auto",
            )
        else:
            start = settings.init
        init = initial_coefficients(start, len(pool.tasks), len(theta0), settings.granularity)
        ties = settings.task_vectors == "ties"
        vectors = (self._vector(pool, task, theta0) for task in pool.tasks)
        trimmed = (trim(vector, settings.keep) if ties else vector for vector in vectors)
        mixture = Mixture(theta0, trimmed, init, getattr(torch, settings.dtype))
        if ties:
            mixture.elect_signs()
        mixture.write(tower)
        if not settings.train:
            mixture.release()
        return tower, mixture

    def _vector(self, pool: ExpertPool, task: str, theta0: Sequence[Tensor]) -> list[Tensor]:
        try:
            return task_vector(pool.tower(task), theta0)
        except ConfigError:
            pool.check_shapes()  # names the expert and the tensor
            raise

    # -- around the trainer ------------------------------------------------------------------------

    def _make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        from hydra.utils import get_class

        given = {k: v for k, v in self.settings.optimizer.items() if k not in HOST_KEYS}
        try:
            cls = get_class(given.pop("_target_", ""))
            if not issubclass(cls, torch.optim.Optimizer):
                raise TypeError(f"{cls.__name__} is no torch optimizer")
            check_arguments(cls, given, "optimizer")
            rate = given.get("lr", 1)
            if rate == 0 or rate > MAX_RATE:
                raise ConfigError("optimizer.lr", shown(rate), f"a number in (0, {MAX_RATE}]")
            if cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
                # one kernel for hundreds of small tensors
                given = {"fused": True} | given
            return cls(parameters, **given)
        except ConfigError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            allowed = "{_target_: torch.optim.Adam, lr: 0.003}"
            raise ConfigError("optimizer", reason, allowed) from None

    def _identity(self, pool: ExpertPool, model: InterventionModel, tasks: Sequence[str]) -> str:
        """A digest of everything the trained numbers depend on."""
        facts = {
            "settings": self._settings(model),
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

    def _settings(self, model: InterventionModel) -> dict[str, Any]:
        return {
            "interventions": self.interventions
            if self.settings.extend is None  # else the saved model's own hold
            else {site: config.to_dict() for site, config in model.interventions.items()},
            "base": self._base_settings(),
            "budget": self.settings.budget,
            "coefficients": self.coefficients and self.coefficients.to_dict(),
            "loss": self.settings.loss,
            "data": self.data.to_dict(),
            "optimizer": self.settings.optimizer,
            "seed": self.settings.seed,
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
        model.to(self.fabric.device)
        rows = {}
        for task, seen in done.images.items():
            count = min(DIAGNOSED_IMAGES, len(seen))
            head = pool.head(task) if dummy else None
            expert = done.expert_features[task][:count]
            images = pool.images(task, self.data.split)
            rows[task] = diagnose(model, task, images, seen[:count], expert, head)
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
