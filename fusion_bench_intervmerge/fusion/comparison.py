"""Several ways to repair the same merge, in one run and by one task pool."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from ..analysis import read_analyses
from ..checkpoint import StateFolder
from ..coefficients import CoefficientSettings
from ..distillation import DataSettings, MethodSettings
from ..distillation.settings import check_method
from ..encoders import VisionTower
from ..errors import ConfigError, named, unknown_key
from ..results import Result, Results
from ..settings import Flag, Seed, Settings, whole
from .algorithm import IntervMergeAlgorithm
from .analyse import Analyser
from .base_merge import run_adamerging
from .experts import ExpertPool
from .hub import warn_if_unreachable
from .individual import IndividualExperts
from .loggers import show
from .program import HOST_KEYS, check_family, split_settings
from .records import repaired
from .screen import host_in_the_log, one_line

log = logging.getLogger(__name__)


class ComparisonSettings(Settings):
    """The settings of ``method=intervmerge/compare`` and its like.

    Args:
        bases: name -> config of a FusionBench method.
        methods: name -> config of an ``IntervMergeAlgorithm``; its own ``base`` is not used. A
            method with ``coefficients`` trains those of the merge that it repairs.
        coefficients: name of a base -> the coefficients that stand for it: ``granularity``,
            ``init``, ``task_vectors``; with ``init: base`` the base is an AdaMerging method, run
            once. Bases without are left out for methods that train coefficients.
        seeds: seeds of the repairs.
        steps: override every method's, so that all have the same; a method with ``steps: 0`` is
            solved, not trained, and keeps it.
        data: override every method's, so that all have the same.
        references: whether the pretrained encoder and the experts themselves are evaluated too.
        analyses: names of analyses of every merge and its repairs at the first seed, ``all``, or
            null; ``analysis.json`` keeps what they find.
        analysis_images: images a task for them, of the test split.

    Raises:
        ConfigError: the first setting that does not fit, those of the methods included.
    """

    bases: Annotated[
        dict[str, Any], Field(min_length=1, description="a FusionBench method or more, by name")
    ]
    methods: Annotated[
        dict[str, dict[str, Any]], Field(description="settings of intervmerge or surgery, by name")
    ]
    coefficients: Annotated[
        dict[str, dict[str, Any]] | None, Field(description="coefficients, by the base's name")
    ] = None
    seeds: Annotated[
        list[Seed], Field(min_length=1, description="a list of whole numbers, 0 or more")
    ] = Field(default=[0])
    steps: Annotated[int | None, whole(0, 10**7, before="null, or ")] = None
    data: Annotated[
        dict[str, Any] | None, Field(description="null, or {split: validation, ...}")
    ] = None
    references: Flag = True
    analyses: Any = None
    analysis_images: Annotated[int, whole(1, 10**9)] = 256

    @model_validator(mode="after")
    def _all_fit(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("seeds", f"{self.seeds} names a seed twice", "each seed once")
        read_analyses(self.analyses)
        for name, base in self.bases.items():
            check_method(base, f"bases.{name}")
        for name, start in (self.coefficients or {}).items():
            if name not in self.bases:
                raise unknown_key(name, self.bases, "base").under("coefficients")
            CoefficientSettings.read(start, f"coefficients.{name}")
        DataSettings.read(self.data or {}, "data")
        for name in self.methods:
            for settings in (self._own(name), self.method(name)):
                MethodSettings.read(settings, f"methods.{name}")
        return self

    def method(self, name: str) -> dict[str, Any]:
        """A method's settings, with those that hold for all."""
        own = self._own(name)
        if self.steps is not None and own.get("steps") != 0:
            own["steps"] = self.steps
        if self.data is not None:
            own["data"] = {**own.get("data", {}), **self.data}
        return own

    def _own(self, name: str) -> dict[str, Any]:
        given = self.methods[name]
        return {k: v for k, v in given.items() if k not in ("_target_", *HOST_KEYS)}


class ComparisonAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Merge by each base, repair each merge by each method and seed, hand all to the task pool.

    Every method gets the same images, steps and merged encoder. The report that FusionBench
    writes then holds, by name, what its task pool says of each model, and ``intervmerge.json``
    beside it what each one is.

    Args:
        bases, methods: as in ``ComparisonSettings``.
        settings: the other ones of ``ComparisonSettings``.

    Raises:
        ConfigError: a setting that does not exist, or not with that value.
    """

    Settings = ComparisonSettings

    @one_line
    def __init__(self, bases: Any = None, methods: Any = None, **settings: Any):
        settings, host = split_settings(settings, bases=bases, methods=methods)
        super().__init__(**host)
        self.settings = ComparisonSettings.read(settings)
        for method in self.settings.methods:
            with named(f"methods.{method}"):
                IntervMergeAlgorithm(**self.settings.method(method))
        self._states: list[StateFolder] = []

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> dict[str, Any]:
        """Returns every model by name."""
        pool = ExpertPool(modelpool)
        check_family(self._program, pool.family)
        warn_if_unreachable(pool.pool._models.values())
        settings = self.settings
        analyser = Analyser(settings.analyses, settings.analysis_images, "test", self.fabric.device)
        tower = pool.first_tower()
        for method in settings.methods:
            with named(f"methods.{method}"):
                self._algorithm(settings.method(method), seed=0).look_ahead(pool, tower)
        models: dict[str, Any] = {}
        about: dict[str, Result] = {}
        if settings.references:
            models["pretrained"] = pool.raw("_pretrained_")
            models["experts"] = IndividualExperts(pool)
            about["pretrained"] = Result(kind="pretrained")
            about["experts"] = Result(kind="experts")
        for base_name, base in settings.bases.items():
            started = time.perf_counter()
            merged, start = self._merge(pool, base_name, base)
            models[base_name] = copy.deepcopy(merged.stock())
            took = time.perf_counter() - started
            about[base_name] = Result(
                kind="merge", base=base_name, extra_parameters=0, seconds=took
            )
            for method_name in settings.methods:
                own = settings.method(method_name)
                if own.get("coefficients"):
                    if start is None:
                        continue
                    own["coefficients"] = {**start, "train": True}
                for seed in settings.seeds:
                    name = f"{base_name}/{method_name}/seed{seed}"
                    log.info("repairing: %s", name)
                    with named(f"methods.{method_name}"):
                        names = {"base": base_name, "method": method_name}
                        models[name], about[name] = self._repair(names, pool, merged, own, seed)
            if analyser.names and self.fabric.is_global_zero:
                repaired = self._first_seed(models, base_name)
                analyser.run(base_name, pool, merged, repaired, pool.tasks)
                analyser.write(Path(self.log_dir or "."), pool.tasks)
            show(self.fabric, about.values(), base_name, analyser.found.get(base_name))
        if self.fabric.is_global_zero:
            Results(tasks=list(pool.tasks), models=about).write(self.log_dir)
        for states in self._states:
            states.clear()
        return models

    def _first_seed(self, models: Mapping[str, Any], base: str) -> dict[str, Any]:
        """Method -> its repair of a merge at the first seed."""
        names = {m: f"{base}/{m}/seed{self.settings.seeds[0]}" for m in self.settings.methods}
        return {method: models[name] for method, name in names.items() if name in models}

    def _merge(
        self, pool: ExpertPool, name: str, base: Any
    ) -> tuple[VisionTower, dict[str, Any] | None]:
        """The merged encoder, and the coefficients that stand for it, if any do."""
        start = (self.settings.coefficients or {}).get(name)
        settings: dict[str, Any] = {"interventions": {"attention": {}}, "base": base}
        if start is not None and start.get("init") == "base":
            found = run_adamerging(base, pool.pool, self.fabric, self._program)
            start = {**start, "init": found.tolist()}
            settings["coefficients"] = {**start, "train": False}
        try:
            return self._algorithm(settings, seed=0).merge(pool)[0], start
        except ConfigError as error:
            if error.where != "base":
                raise
            raise ConfigError(f"bases.{name}", error.problem, error.allowed) from error

    def _repair(
        self,
        names: Mapping[str, str],
        pool: ExpertPool,
        merged: VisionTower,
        settings: Mapping[str, Any],
        seed: int,
    ) -> tuple[nn.Module, Result]:
        algorithm = self._algorithm(settings, seed)
        started = time.perf_counter()
        if algorithm.coefficients is not None:
            tower, mixture = algorithm.merge(pool)
        else:
            tower, mixture = copy.deepcopy(merged), None
        model, done = algorithm.repair(pool, tower, mixture)
        if done.states is not None:
            self._states.append(done.states)
        # the base among a method's settings is not the one that was used here
        own = algorithm._settings(model) | {"base": None}
        seconds = time.perf_counter() - started
        return model, repaired(model, done, [algorithm.images_used], own, seconds=seconds, **names)

    def _algorithm(self, settings: Mapping[str, Any], seed: int) -> IntervMergeAlgorithm:
        algorithm = IntervMergeAlgorithm(**{**settings, "seed": seed})
        algorithm._program, algorithm._fabric_instance = self._program, self.fabric
        return algorithm
