"""Several ways to repair the same merge, in one run and by one task pool."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..encoders import VisionTower
from ..errors import ConfigError
from .algorithm import IntervMergeAlgorithm
from .experts import ExpertPool
from .individual import IndividualExperts

log = logging.getLogger(__name__)


class ComparisonAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Merge by each base, repair each merge by each method and seed, hand all to the task pool.

    Every method gets the same images, steps and merged encoder. The report that FusionBench
    writes then holds, by name, what its task pool says of each model, and under ``comparison``
    what each one is.

    Args:
        bases: name -> config of a FusionBench method.
        methods: name -> config of an ``IntervMergeAlgorithm`` (its own ``base`` is not used; with
            ``coefficients`` it merges by itself, and is run under the bases that ``only`` names).
        seeds: seeds of the repairs.
        steps, data: override every method's, so that all have the same.
        references: whether the pretrained encoder and the experts themselves are evaluated too.
    """

    def __init__(
        self,
        bases: Mapping[str, Any],
        methods: Mapping[str, Any],
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        data: Mapping[str, Any] | None = None,
        references: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not bases:
            raise ConfigError(
                "bases", "there is no merge to repair", "a FusionBench method or more"
            )
        self.bases, self.methods, self.seeds = bases, methods, list(seeds)
        self.steps, self.data, self.references = steps, data, references

    def run(self, modelpool: BaseModelPool) -> dict[str, Any]:
        """Returns every model by name, and ``comparison``: what each is."""
        pool = ExpertPool(modelpool)
        models: dict[str, Any] = {}
        about: dict[str, dict[str, Any]] = {}
        if self.references:
            models["pretrained"] = pool.raw("_pretrained_")
            models["experts"] = IndividualExperts(pool)
            about["pretrained"] = {"kind": "pretrained"}
            about["experts"] = {"kind": "experts"}
        for base_name, base in self.bases.items():
            merger = self._algorithm({"interventions": {"attention": {}}, "base": base}, seed=0)
            started = time.perf_counter()
            merged, _ = merger.merge(pool)
            models[base_name] = _stock(merged)
            about[base_name] = {
                "kind": "merge",
                "base": base_name,
                "method": "none",
                "extra_parameters": 0,
                "seconds": time.perf_counter() - started,
            }
            for method_name, config in self.methods.items():
                for seed in self.seeds:
                    name = f"{base_name}/{method_name}/seed{seed}"
                    log.info("repairing: %s", name)
                    models[name], about[name] = self._repair(
                        pool, merged, config, seed, base_name, method_name
                    )
        models["comparison"] = {"tasks": pool.tasks, "models": about}
        return models

    def _repair(
        self,
        pool: ExpertPool,
        merged: VisionTower,
        config: Any,
        seed: int,
        base_name: str,
        method_name: str,
    ) -> tuple[nn.Module, dict[str, Any]]:
        algorithm = self._algorithm(config, seed)
        started = time.perf_counter()
        if algorithm.coefficients is not None:
            tower, mixture = algorithm.merge(pool)
        else:
            tower, mixture = copy.deepcopy(merged), None
        model, done = algorithm.repair(pool, tower, mixture)
        return model, {
            "kind": "repair",
            "base": base_name,
            "method": method_name,
            "seed": seed,
            "extra_parameters": model.extra_parameters()["total"],
            "seconds": time.perf_counter() - started,
            "images_used": algorithm.images_used,
            "transductive": algorithm.data["split"] == "test",
            "final_loss": float(done.losses[-1].mean()),
            "losses": done.by_task(),
        }

    def _algorithm(self, config: Any, seed: int) -> IntervMergeAlgorithm:
        settings: Any = (
            OmegaConf.to_container(config) if isinstance(config, DictConfig) else dict(config)
        )
        settings = {k: v for k, v in settings.items() if not k.startswith("_")} | {"seed": seed}
        if self.steps is not None:
            settings["steps"] = self.steps
        if self.data is not None:
            settings["data"] = {**(settings.get("data") or {}), **self.data}
        algorithm = IntervMergeAlgorithm(**settings)
        algorithm._program, algorithm._fabric_instance = self._program, self.fabric
        return algorithm


def _stock(tower: VisionTower) -> nn.Module:
    """The vision model as FusionBench's task pools know it, without our wrapper or hooks."""
    return copy.deepcopy(tower.stock())
