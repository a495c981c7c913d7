"""``fusion_bench method=intervmerge``: merge, distil, report.

Surgery and SurgeryV2 are configs of the same algorithm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.constants import RuntimeConstants
from fusion_bench.mixins import LightningFabricMixin, SimpleProfilerMixin
from rich.console import Console
from torch import nn

from ..cache import cache_root
from ..coefficients import (
    Mixture,
    initial_coefficients,
    read_settings,
    task_vector,
    trim,
)
from ..distillation import Distillation, distill
from ..encoders import VisionTower
from ..errors import ConfigError
from ..files import write_json
from ..interventions import read_interventions
from ..model import InterventionModel
from .base_merge import run_adamerging, run_base
from .diagnosis import diagnose, table
from .experts import ExpertPool
from .live import show_repair
from .program import has_task_pool, plain

log = logging.getLogger(__name__)

DATA = {"split": "test", "fraction": 1.0, "batch_size": 16, "num_workers": 0, "cache_gb": 2.0}
DIAGNOSED_IMAGES = 256


class IntervMergeAlgorithm(LightningFabricMixin, SimpleProfilerMixin, BaseAlgorithm):
    """Merge experts and repair the merged encoder by distilling task-specific edits.

    Args:
        interventions: site -> edit settings (``InterventionConfig``).
        base: config of the FusionBench method that merges the experts, any of them:
            ``method@method.base=ties_merging``; a ``_merged_`` model in the pool wins over it, and
            ``coefficients`` over both.
        coefficients: merge by task vectors with these coefficients instead (``read_settings``).
        loss: ``output``, the mean L1 of the image features, or ``blocks``, which adds that of every
            block's token mean (SurgeryV2).
        data: the unlabelled images to learn from: ``split``, ``fraction``, ``batch_size``,
            ``num_workers``, ``cache_gb``.
        steps: steps a task; each shows every task one batch of its images.
        optimizer: config of any torch optimizer. The published optimizer lists every parameter
            three times, so that each of its steps at 1e-3 is three steps of Adam; hence 3e-3.
        seed: decides initial edits, images and their order.
        save_to: folder for the artifact; ``{log_dir}`` stands for the run's log folder.
        resume: ``auto`` continues a run of the same settings that was stopped, and takes the
            coefficients that an earlier run of AdaMerging found on the pool; ``never`` does not.
        save_every: steps between two states of a run that may be stopped.
        compile: compile the encoder's MLPs for the training; it takes about half a minute, and pays
            in long runs of wide encoders.
        extend: folder of a saved model, to which the pool's new tasks are added; nothing is merged
            and its own ``interventions`` hold.
    """

    def __init__(
        self,
        interventions: Mapping[str, Any],
        base: Any = None,
        coefficients: Mapping[str, Any] | None = None,
        loss: str = "output",
        data: Mapping[str, Any] | None = None,
        steps: int = 1000,
        optimizer: Mapping[str, Any] | None = None,
        seed: int = 0,
        save_to: str | None = None,
        resume: str = "auto",
        save_every: int = 100,
        compile: bool = False,
        extend: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.interventions = plain(interventions)
        self.base: Any = base
        self.coefficients: Any = plain(coefficients)
        self.loss, self.steps, self.seed = loss, steps, seed
        self.data = DATA | (plain(data) or {})
        self.optimizer = plain(optimizer) or {"_target_": "torch.optim.Adam", "lr": 3e-3}
        self.save_to, self.resume, self.save_every = save_to, resume, save_every
        self.extend, self.compile = extend, compile
        for key in self.data:
            if key not in DATA:
                raise ConfigError(f"data.{key}", "no such setting", ", ".join(DATA))
        if not isinstance(save_every, int) or isinstance(save_every, bool) or save_every < 1:
            raise ConfigError("save_every", f"{save_every!r}", "1 or more")
        if resume not in ("auto", "never"):
            raise ConfigError("resume", f"{resume!r}", "auto, never")
        read_interventions(self.interventions)
        if self.coefficients is not None:
            self.coefficients = read_settings(self.coefficients)

    def run(self, modelpool: BaseModelPool) -> InterventionModel:
        """Merge the pool's experts and train the edits.

        Returns:
            The model, which FusionBench's task pools evaluate task by task.

        Raises:
            ConfigError: a setting or a pool that does not fit, in one line.
            DistillationError: the loss is not finite.
        """
        pool = ExpertPool(modelpool)
        if self.save_to is not None:
            self._check_writable(self._artifact_folder())
        if self.extend is not None:
            model, done = self._extend(pool, Path(self.extend))
        else:
            with self.profile("merging"):
                merged, mixture = self.merge(pool)
            with self.profile("distillation"):
                model, done = self.repair(pool, merged, mixture)
        report = self._report(pool, model, done)
        self._remember(pool, model, done, report)
        if self.save_to is not None and self.fabric.is_global_zero:
            folder = self._artifact_folder()
            model.save_pretrained(folder)
            log.info("the model is saved in %s", folder)
        self.print_profile_summary()
        return model

    def _remember(
        self,
        pool: ExpertPool,
        model: InterventionModel,
        done: Distillation,
        report: Mapping[str, Any],
    ) -> None:
        """Keep with the model its CLIP, and what it was trained on, earlier trainings included."""
        seen, now = model.metadata, {key: report[key] for key in ("method", "transductive")}
        about = pool.about()
        classes = (seen.get("classes") or {}) | about.pop("classes", {})
        seen |= about | ({"classes": classes} if classes else {})
        if self.extend is None:
            model.metadata |= {"images": report["images_used"], **now}
            return
        before = seen.get("images") or "images that are not known"
        seen["images"] = f"{before}; {', '.join(done.images)}: {report['images_used']}"
        seen["transductive"] = seen.get("transductive", False) or now["transductive"]
        seen["extended"] = [*seen.get("extended", []), {"tasks": list(done.images), **now}]

    def merge(self, pool: ExpertPool) -> tuple[VisionTower, Mixture | None]:
        """The merged encoder, and the mixture it came from where ``coefficients`` are set."""
        if self.coefficients is not None:
            return self._mix(pool)
        # Ask for what every method will ask for, so that what is missing is said in one line.
        name = "_merged_" if pool.pool.has_merged else pool.pool.all_model_names[0]
        tower = pool.tower(name)
        if pool.pool.has_merged:
            log.info("the pool has a merged model: it is repaired, and `base` is not run")
            return tower, None
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
        model = InterventionModel(merged, pool.tasks, self.interventions, self.seed)
        trained = mixture if mixture is not None and self.coefficients["train"] else None
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
        images = {task: pool.images(task, self.data["split"]) for task in tasks}
        run = self._identity(pool, model, tasks)
        return distill(
            model,
            {task: partial(pool.tower, task) for task in tasks},
            images,
            steps=self._steps,
            batch_size=self.data["batch_size"],
            fraction=self.data["fraction"],
            num_workers=self.data["num_workers"],
            cache_gb=self.data["cache_gb"],
            compile=self.compile,
            loss=self.loss,
            optimizer=self._make_optimizer,
            mixture=mixture,
            seed=self.seed,
            fabric=self.fabric,
            # Nothing tells one live model from another, so their runs are not continued.
            state_folder=None
            if self.resume == "never" or pool.pool.has_instance_models
            else cache_root() / "states" / run,
            run=run,
            save_every=self.save_every,
        )

    @property
    def images_used(self) -> str:
        """In words, which images the edits were trained on."""
        return (
            f"{self.data['fraction']:.0%} of the {self.data['split']} split, unlabelled, "
            f"{self._steps} steps of {self.data['batch_size']} images a task, seed {self.seed}"
        )

    @property
    def _steps(self) -> int:
        return min(self.steps, 2) if RuntimeConstants.debug else self.steps

    # -- merging -----------------------------------------------------------------------------------

    def _mix(self, pool: ExpertPool) -> tuple[VisionTower, Mixture]:
        settings = self.coefficients
        tower = pool.tower("_pretrained_")
        theta0 = [p.detach().clone() for p in tower.mergeable().values()]
        if settings["init"] == "base":
            start = run_adamerging(
                self.base, pool.pool, self.fabric, self._program, keep=self.resume == "auto"
            )
        else:
            start = settings["init"]
        init = initial_coefficients(start, len(pool.tasks), len(theta0), settings["granularity"])
        ties = settings["task_vectors"] == "ties"
        vectors = (task_vector(pool.tower(task), theta0) for task in pool.tasks)
        trimmed = (trim(vector, settings["keep"]) if ties else vector for vector in vectors)
        mixture = Mixture(theta0, trimmed, init, getattr(torch, settings["dtype"]))
        if ties:
            mixture.elect_signs()
        mixture.write(tower)
        if not settings["train"]:
            mixture.release()
        return tower, mixture

    # -- around the trainer ------------------------------------------------------------------------

    def _make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        from hydra.utils import get_class

        settings = {k: v for k, v in self.optimizer.items() if k not in ("_target_", "_recursive_")}
        try:
            cls = get_class(self.optimizer["_target_"])
            if cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
                # one kernel for hundreds of small tensors
                settings = {"fused": True} | settings
            return cls(parameters, **settings)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                "optimizer", reason, "{_target_: torch.optim.Adam, lr: 0.003}"
            ) from None

    def _identity(self, pool: ExpertPool, model: InterventionModel, tasks: Sequence[str]) -> str:
        """A digest of everything the trained numbers depend on."""
        facts = {
            "settings": self._settings(model),
            "model_seed": model.seed,
            "steps": self._steps,
            "merged": model.tower.digest(),
            "experts": {task: pool.identity(task) for task in tasks},
            "images": {task: pool.images_identity(task, self.data["split"]) for task in tasks},
            "precision": str(getattr(self.fabric._precision, "precision", "")),
            "processes": self.fabric.world_size,
            "compile": self.compile,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]

    def _settings(self, model: InterventionModel) -> dict[str, Any]:
        return {
            "interventions": self.interventions
            if self.extend is None  # else the saved model's own hold
            else {site: config.to_dict() for site, config in model.interventions.items()},
            "base": self._base_settings(),
            "coefficients": self.coefficients,
            "loss": self.loss,
            "data": self.data,
            "optimizer": self.optimizer,
            "seed": self.seed,
        }

    def _base_settings(self) -> Any:
        """The base's config; of a method object nothing but its kind can be told."""
        if self.base is None or isinstance(self.base, Mapping):
            return plain(self.base)
        return repr(type(self.base))

    def _report(
        self,
        pool: ExpertPool,
        model: InterventionModel,
        done: Distillation,
    ) -> dict[str, Any]:
        """Print how far the model got; keep the whole story beside FusionBench's report."""
        dummy = self._program is not None and not has_task_pool(self._program)
        model.to(self.fabric.device)
        rows = {}
        for task, seen in done.images.items():
            count = min(DIAGNOSED_IMAGES, len(seen))
            head = pool.head(task) if dummy else None
            expert = done.expert_features[task][:count]
            images = pool.images(task, self.data["split"])
            rows[task] = diagnose(model, task, images, seen[:count], expert, head)
        extra = model.extra_parameters()
        report = {
            "method": self._settings(model),
            "images_used": self.images_used,
            # Evaluated on the test split, edits trained on its images are a transductive result.
            "transductive": self.data["split"] == "test",
            "images_seen": {task: len(seen) for task, seen in done.images.items()},
            "extra_parameters": extra,
            "seconds": done.seconds,
            "resumed_at": done.resumed_at,
            "features": rows,
            "losses": done.by_task(),
        }
        if self.fabric.is_global_zero:
            console = Console()
            console.print("Image features against the experts', merged and repaired", style="bold")
            console.print(table(rows))
            console.print(f"{extra['total']:,} extra parameters, trained on {self.images_used}.")
            if dummy:
                console.print(f"For accuracies add a task pool: {_suggested_task_pool()}")
            if self.log_dir is not None:
                write_json(Path(self.log_dir) / "intervmerge.json", report)
        show_repair(self.fabric, report["losses"], rows)
        return report

    def _artifact_folder(self) -> Path:
        return Path(str(self.save_to).format(log_dir=self.log_dir or "."))

    def _check_writable(self, folder: Path) -> None:
        """Say so before the training, not after it."""
        parent = folder.absolute()
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK):
            raise ConfigError("save_to", f"{parent} cannot be written to", "a writable folder")


def _suggested_task_pool() -> str:
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        chosen = str(HydraConfig.get().runtime.choices.get("modelpool", ""))
        if chosen and "/" not in chosen:
            return f"taskpool={chosen}"
    return "taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8"
