"""Several ways to repair the same merge, in one run and by one task pool."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Annotated, Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from hydra.utils import get_class
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from ..analysis import read_analyses
from ..config import (
    HOST_KEYS,
    ConfigError,
    Flag,
    Json,
    Seed,
    Settings,
    checked,
    named,
    unknown_key,
    whole,
)
from ..data import DataSettings
from ..encoders.base import VisionTower
from ..merging import CoefficientSettings
from ..model.model import InterventionModel
from ..model.protocols import Repair
from ..results import Images, Result, Results
from .algorithm import IntervMergeAlgorithm
from .analyse import Analyser
from .encoder_per_task import ExpertPerTask
from .experts import ExpertPool
from .host import adopted, check_task_pool, split_settings
from .hosted_models import hosted
from .hub import warn_if_unreachable
from .loggers import show
from .merge import merge_experts, run_adamerging
from .rivals import FusionBenchMethod
from .screen import host_in_the_log, one_line
from .settings import check_method

log = logging.getLogger(__name__)


_NOT_SETTINGS = ("_target_", *HOST_KEYS)


class ComparisonSettings(Settings):
    """The settings of ``method=intervmerge/compare`` and its like.

    Args:
        bases: name -> config of a FusionBench method.
        methods: name -> config of a repair (``_target_``: a ``Repair``); its own ``base`` is not
            used. A method with ``coefficients`` trains those of the merge that it repairs.
        rivals: name -> config of a FusionBench method, or of a repair, that stands by itself: it
            starts from the experts, whatever merge is repaired beside it.
        coefficients: name of a base -> the coefficients that stand for it: ``granularity``,
            ``init``, ``task_vectors``; with ``init: base`` the base is an AdaMerging method, run
            once. Bases without are left out for methods that train coefficients.
        seeds: seeds of the repairs; what no seed decides (edits solved on all images) is run once.
        steps: override every method's, so that all have the same; a method with ``steps: 0`` is
            solved, not trained, and keeps it.
        data: override every method's, so that all have the same.
        images: what bases and rivals see: name -> fields of ``results.Images``.
        labels: how many labelled images a task bases and rivals need, by name.
        keep_going: whether a merge or rival that fails is a line in the results, and not the end.
        references: whether the pretrained encoder and the experts themselves are evaluated too.
        analyses: names of analyses of every merge and its repairs at the first seed, ``all``, or
            null; ``analysis.json`` keeps what they find.
        analysis_images: images a task for them, of the test split.

    Raises:
        ConfigError: the first setting that does not fit, those of the methods included.
    """

    bases: Annotated[Json, Field(min_length=1, description="a FusionBench method or more, by name")]
    methods: Annotated[
        dict[str, Json], Field(description="settings of intervmerge or surgery, by name")
    ]
    rivals: Annotated[dict[str, Json], Field(description="methods, by name")] = Field(default={})
    coefficients: Annotated[
        dict[str, Json] | None, Field(description="coefficients, by the base's name")
    ] = None
    seeds: Annotated[
        list[Seed], Field(min_length=1, description="a list of whole numbers, 0 or more")
    ] = Field(default=[0])
    steps: Annotated[int | None, whole(0, 10**7, before="null, or ")] = None
    data: Annotated[Json | None, Field(description="null, or {split: validation, ...}")] = None
    images: Annotated[dict[str, Json], Field(description="images, by name")] = Field(default={})
    labels: Annotated[dict[str, int], Field(description="whole numbers, by name")] = Field(
        default={}
    )
    keep_going: Flag = False
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
        for name, rival in self.rivals.items():
            check_method(rival, f"rivals.{name}")
            if name in self.bases:
                raise ConfigError(f"rivals.{name}", "a base has that name", "another name")
        for group in ("images", "labels"):
            for name in getattr(self, group):
                if name not in {*self.bases, *self.rivals}:
                    raise unknown_key(name, [*self.bases, *self.rivals], "base or rival").under(
                        group
                    )
        for name, images in self.images.items():
            checked(Images, images, f"images.{name}")
        for name in self.methods:
            for settings in (self._own(name), self.method(name)):
                self.repair_class(name).Settings.read(settings, f"methods.{name}")
        return self

    def needs(self, name: str) -> Json:
        """Fields of the result of a base or rival: the images it sees."""
        images = [Images(**self.images[name])] if name in self.images else []
        return {"images": images, "labels": self.labels.get(name, 0)}

    def repair_class(self, name: str) -> type[Repair]:
        """What repairs by a method: its ``_target_``, IntervMerge's algorithm where it has none.

        Raises:
            ConfigError: it is no ``Repair``.
        """
        target = self.methods[name].get("_target_")
        if target is None:
            return IntervMergeAlgorithm
        try:
            found = get_class(target)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"methods.{name}._target_", reason, "a repair") from error
        if not issubclass(found, Repair):
            allowed = "a subclass of fusion_bench_intervmerge.protocols.Repair"
            raise ConfigError(f"methods.{name}._target_", f"{target} is no repair", allowed)
        return found

    def method(self, name: str) -> Json:
        """A method's settings, with those that hold for all that have them."""
        own, fields = self._own(name), self.repair_class(name).Settings.model_fields
        if "steps" in fields and self.steps is not None and own.get("steps") != 0:
            own["steps"] = self.steps
        if "data" in fields and self.data is not None:
            own["data"] = {**own.get("data", {}), **self.data}
        return own

    def _own(self, name: str) -> Json:
        given = self.methods[name]
        return {k: v for k, v in given.items() if k not in _NOT_SETTINGS}


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
    def __init__(self, bases: object = None, methods: object = None, **settings: object):
        settings, host = split_settings(settings, bases=bases, methods=methods)
        super().__init__(**host)
        self.settings = ComparisonSettings.read(settings)
        for method in self.settings.methods:
            self._build(method)  # refused now, not after the merge
        for rival in self.settings.rivals:
            self._rival(rival)

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> dict[str, object]:
        """Returns every model by name."""
        pool = ExpertPool(modelpool)
        check_task_pool(self._program, pool.family)
        warn_if_unreachable(pool.pool._models.values())
        settings = self.settings
        analyser = Analyser(settings.analyses, settings.analysis_images, "test", self.fabric.device)
        tower = pool.first_tower()
        for method in settings.methods:
            repair = self._build(method)
            with named(f"methods.{method}"):
                repair.look_ahead(pool, tower)
        self._problems: dict[str, str] = {}
        models: dict[str, object] = {}
        about: dict[str, Result] = {}
        repairs: list[Repair] = []
        if settings.references:
            models["pretrained"] = pool.raw("_pretrained_")
            models["experts"] = hosted(ExpertPerTask(pool), tower)
            about["pretrained"] = Result(kind="pretrained")
            about["experts"] = Result(kind="experts")
        for name in settings.rivals:
            with self._going_on(name):
                log.info("running: %s", name)
                repair, pretrained = self._rival(name), pool.tower("_pretrained_")
                repairs.append(repair)
                models[name], result = self._repair(repair, f"rivals.{name}", pool, pretrained)
                about[name] = result.model_copy(update={"method": name, **settings.needs(name)})
        for base_name, base in settings.bases.items():
            started = time.perf_counter()
            merged = None
            with self._going_on(base_name):
                merged, start = self._merge(pool, base_name, base)
            if merged is None:
                continue
            models[base_name] = copy.deepcopy(merged.library_model())
            took = time.perf_counter() - started
            about[base_name] = Result(
                kind="merge",
                base=base_name,
                extra_parameters=0,
                bytes=0,
                seconds=took,
                **settings.needs(base_name),
            )
            for method in settings.methods:
                given = {}
                if settings.method(method).get("coefficients"):
                    if start is None:
                        continue
                    given = {"coefficients": {**start, "train": True}}
                for seed in settings.seeds if self._build(method).seeded(pool) else [None]:
                    name = "/".join([base_name, method] + [f"seed{seed}"] * (seed is not None))
                    log.info("repairing: %s", name)
                    repair = self._build(method, given if seed is None else {"seed": seed, **given})
                    repairs.append(repair)
                    models[name], result = self._repair(repair, f"methods.{method}", pool, merged)
                    told = {"base": base_name, "method": method, "seed": seed}
                    about[name] = result.model_copy(update=told)
            if analyser.names and self.fabric.is_global_zero:
                repaired = self._first_seed(models, base_name)
                analyser.run(base_name, pool, merged, repaired, pool.tasks)
                analyser.write(Path(self.log_dir or "."), pool.tasks)
            show(self.fabric, about.values(), base_name, analyser.found.get(base_name))
        if self.fabric.is_global_zero:
            found = Results(tasks=list(pool.tasks), models=about, problems=self._problems)
            found.write(self.log_dir)
        for repair in repairs:
            repair.clear()
        return models

    def _first_seed(self, models: Mapping[str, object], base: str) -> dict[str, InterventionModel]:
        """Method -> its repair of a merge at the first seed; analyses look into our own alone."""
        found = {
            method: models.get(f"{base}/{method}/seed{self.settings.seeds[0]}")
            or models.get(f"{base}/{method}")
            for method in self.settings.methods
        }
        return {m: model for m, model in found.items() if isinstance(model, InterventionModel)}

    def _merge(self, pool: ExpertPool, name: str, base: object) -> tuple[VisionTower, Json | None]:
        """The merged encoder, and the coefficients that stand for it, if any do."""
        start, settings = (self.settings.coefficients or {}).get(name), None
        if start is not None and start.get("init") == "base":
            found = run_adamerging(base, pool.pool, self.fabric, self._program)
            start = {**start, "init": found.tolist()}
            settings = CoefficientSettings.read({**start, "train": False}, "coefficients")
        try:
            return merge_experts(pool, base, settings, self.fabric, self._program)[0], start
        except ConfigError as error:
            if error.where != "base":
                raise
            raise ConfigError(f"bases.{name}", error.problem, error.allowed) from error

    def _repair(
        self, repair: Repair, where: str, pool: ExpertPool, merged: VisionTower
    ) -> tuple[nn.Module, Result]:
        started = time.perf_counter()
        with named(where):
            model: Any = repair.repair(pool, copy.deepcopy(merged))
        seconds = time.perf_counter() - started
        result = repair.record(model).model_copy(update={"seconds": seconds})
        return hosted(model, merged), result

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """What fails inside is written down, where the settings say so, and the run goes on."""
        try:
            yield
        except Exception as error:  # another's method may fail in any way
            if not self.settings.keep_going:
                raise
            line = " ".join(str(error).split()) or type(error).__name__
            self._problems[name] = f"{type(error).__name__}: {line}"[:300]
            log.warning("%s did not run: %s", name, line)

    def _rival(self, name: str) -> Repair:
        config = self.settings.rivals[name]
        repair: object
        with named(f"rivals.{name}"):
            found: object = None
            with suppress(ErrorDuringImport):  # what cannot be imported fails when it runs
                found = locate(config.get("_target_", ""))
            if isinstance(found, type) and issubclass(found, Repair):
                repair = found(**{k: v for k, v in config.items() if k not in _NOT_SETTINGS})
            else:
                repair = FusionBenchMethod(method=config)
        return adopted(repair, self._program, self.fabric)

    def _build(self, method: str, more: Mapping[str, object] | None = None) -> Repair:
        """A method's repair, with the settings that hold for all."""
        settings = self.settings
        with named(f"methods.{method}"):
            own = settings.method(method) | dict(more or {})
            repair: Any = settings.repair_class(method)(**own)
        return adopted(repair, self._program, self.fabric)
