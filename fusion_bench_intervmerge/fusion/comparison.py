"""Several ways to repair the same merge, in one run and by one task pool."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from torch import nn

from ..distillation import StateFolder
from ..encoders import VisionTower
from ..errors import ConfigError
from ..files import write_json
from .algorithm import IntervMergeAlgorithm
from .analyse import Analyser
from .base_merge import run_adamerging
from .experts import ExpertPool
from .individual import IndividualExperts
from .live import show_comparison
from .program import plain

log = logging.getLogger(__name__)


class ComparisonAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Merge by each base, repair each merge by each method and seed, hand all to the task pool.

    Every method gets the same images, steps and merged encoder. The report that FusionBench
    writes then holds, by name, what its task pool says of each model, and under ``comparison``
    what each one is.

    Args:
        bases: name -> config of a FusionBench method.
        methods: name -> config of an ``IntervMergeAlgorithm``; its own ``base`` is not used. A
            method with ``coefficients`` trains those of the merge that it repairs.
        coefficients: name of a base -> the coefficients that stand for it: ``granularity``,
            ``init``, ``task_vectors``; with ``init: base`` the base is an AdaMerging method, run
            once. Bases without are left out for methods that train coefficients.
        seeds: seeds of the repairs.
        steps, data: override every method's, so that all have the same.
        references: whether the pretrained encoder and the experts themselves are evaluated too.
        analyses: names of analyses of every merge and its repairs at the first seed, ``all``, or
            null; ``analysis.json`` keeps what they find.
        analysis_images: images a task for them, of the test split.
    """

    def __init__(
        self,
        bases: Mapping[str, Any],
        methods: Mapping[str, Any],
        coefficients: Mapping[str, Any] | None = None,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        data: Mapping[str, Any] | None = None,
        references: bool = True,
        analyses: Any = None,
        analysis_images: int = 256,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not bases:
            raise ConfigError(
                "bases", "there is no merge to repair", "a FusionBench method or more"
            )
        self.bases, self.methods, self.seeds = bases, methods, list(seeds)
        self.coefficients: Any = plain(coefficients) or {}
        self.steps, self.data, self.references = steps, data, references
        self.analyses, self.analysis_images = analyses, analysis_images
        self._losses: dict[str, dict[str, list[float]]] = {}
        self._states: list[StateFolder] = []

    def run(self, modelpool: BaseModelPool) -> dict[str, Any]:
        """Returns every model by name, and ``comparison``: what each is."""
        pool = ExpertPool(modelpool)
        analyser = Analyser(self.analyses, self.analysis_images, "test", self.fabric.device)
        models: dict[str, Any] = {}
        about: dict[str, dict[str, Any]] = {}
        if self.references:
            models["pretrained"] = pool.raw("_pretrained_")
            models["experts"] = IndividualExperts(pool)
            about["pretrained"] = {"kind": "pretrained"}
            about["experts"] = {"kind": "experts"}
        for base_name, base in self.bases.items():
            started = time.perf_counter()
            merged, start = self._merge(pool, base_name, base)
            models[base_name] = copy.deepcopy(merged.stock())
            about[base_name] = {
                "kind": "merge",
                "base": base_name,
                "method": "none",
                "extra_parameters": 0,
                "seconds": time.perf_counter() - started,
            }
            for method_name, config in self.methods.items():
                settings = {k: v for k, v in plain(config).items() if not k.startswith("_")}
                if settings.get("coefficients"):
                    if start is None:
                        continue
                    settings["coefficients"] = {**start, "train": True}
                for seed in self.seeds:
                    name = f"{base_name}/{method_name}/seed{seed}"
                    log.info("repairing: %s", name)
                    models[name], about[name] = self._repair(name, pool, merged, settings, seed)
                    about[name] |= {"base": base_name, "method": method_name}
            if analyser.names and self.fabric.is_global_zero:
                repaired = self._first_seed(models, base_name)
                analyser.run(base_name, pool, merged, repaired, pool.tasks)
                analyser.write(Path(self.log_dir or "."), pool.tasks)
            repairs = [
                (about[n]["base"], about[n]["method"], about[n]["seed"], losses)
                for n, losses in self._losses.items()
            ]
            show_comparison(self.fabric, repairs, base_name, analyser.found.get(base_name, {}))
        if self.log_dir is not None and self.fabric.is_global_zero:
            # apart from the report, which FusionBench prints whole
            write_json(Path(self.log_dir) / "losses.json", self._losses, indent=None)
        for states in self._states:
            states.clear()
        models["comparison"] = {"tasks": pool.tasks, "models": about}
        return models

    def _first_seed(self, models: Mapping[str, Any], base: str) -> dict[str, Any]:
        """Method -> its repair of a merge at the first seed."""
        names = {m: f"{base}/{m}/seed{seed}" for m in self.methods for seed in self.seeds[:1]}
        return {method: models[name] for method, name in names.items() if name in models}

    def _merge(
        self, pool: ExpertPool, name: str, base: Any
    ) -> tuple[VisionTower, dict[str, Any] | None]:
        """The merged encoder, and the coefficients that stand for it, if any do."""
        start = self.coefficients.get(name)
        settings: dict[str, Any] = {"interventions": {"attention": {}}, "base": base}
        if start is not None and start.get("init") == "base":
            found = run_adamerging(base, pool.pool, self.fabric, self._program)
            start = {**start, "init": found.tolist()}
            settings["coefficients"] = {**start, "train": False}
        return self._algorithm(settings, seed=0).merge(pool)[0], start

    def _repair(
        self,
        name: str,
        pool: ExpertPool,
        merged: VisionTower,
        settings: Mapping[str, Any],
        seed: int,
    ) -> tuple[nn.Module, dict[str, Any]]:
        algorithm = self._algorithm(settings, seed)
        started = time.perf_counter()
        if algorithm.coefficients is not None:
            tower, mixture = algorithm.merge(pool)
        else:
            tower, mixture = copy.deepcopy(merged), None
        model, done = algorithm.repair(pool, tower, mixture)
        self._losses[name] = done.by_task()
        if done.states is not None:
            self._states.append(done.states)
        return model, {
            "kind": "repair",
            "seed": seed,
            "extra_parameters": model.extra_parameters()["total"],
            "seconds": time.perf_counter() - started,
            "resumed_at": done.resumed_at,
            "images_used": algorithm.images_used,
            "transductive": algorithm.data["split"] == "test",
            "final_loss": float(done.losses[-1].mean()),
        }

    def _algorithm(self, settings: Mapping[str, Any], seed: int) -> IntervMergeAlgorithm:
        settings = {**settings, "seed": seed}
        if self.steps is not None:
            settings["steps"] = self.steps
        if self.data is not None:
            settings["data"] = {**(settings.get("data") or {}), **self.data}
        algorithm = IntervMergeAlgorithm(**settings)
        algorithm._program, algorithm._fabric_instance = self._program, self.fabric
        return algorithm
