"""Several ways to repair the same merge, in one run and by one task pool."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fusion_bench import BaseModelPool
from fusion_bench.constants import RuntimeConstants
from hydra.utils import get_class
from omegaconf import OmegaConf
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
    named,
    unknown_key,
    whole,
)
from ..data import DataSettings
from ..encoders.base import VisionTower
from ..files import write_json
from ..merging import CoefficientSettings
from ..model.model import InterventionModel
from ..model.protocols import Repair
from ..report.runs import read_json
from ..results import ImagesUsed, Result
from .algorithm import IntervMergeAlgorithm
from .calibrate import merge
from .host import (
    Method,
    attach,
    check_task_pool,
    has_task_pool,
    host_in_the_log,
    name_models,
    one_line,
    plain,
)
from .hosted import hosted
from .merge import run_adamerging
from .pools import ExpertPool, prepare_task_pool
from .records import Analyser, summarize_at_exit
from .rivals import ExpertPerTask, FusionBenchMethod
from .settings import check_method

log = logging.getLogger(__name__)

_NOT_SETTINGS = ("_target_", *HOST_KEYS)


class ComparisonSettings(Settings):
    """The settings of ``method=intervmerge/compare`` and its like.

    Args:
        bases: name -> config of a FusionBench method.
        methods: name -> config of a repair (``_target_``: a ``Repair``); its own ``base`` is not
            used, unless it calibrates: then it calibrates the merge. A method with
            ``coefficients`` trains those of the merge that it repairs.
        rivals: name -> config of a FusionBench method, or of a repair, that starts from the
            experts, whatever merge is repaired beside it.
        coefficients: name of a base -> coefficients that reproduce it: ``granularity``, ``init``,
            ``task_vectors``; with ``init: base`` the base is an AdaMerging method, run once. Bases
            without are left out for methods that train coefficients.
        seeds: seeds of the repairs; edits that no seed decides (solved on all images) are found
            once.
        train_coefficients: name of a base -> methods that train its coefficients with their edits,
            as published for AdaMerging.
        steps: override every method's, so that all have the same; a method with ``steps: 0`` is
            solved, not trained, and keeps it.
        data: override every method's, so that all have the same.
        images: the images that bases and rivals see: name -> fields of ``results.ImagesUsed``.
        labels: labelled images per task that bases and rivals need, by name.
        keep_going: whether what fails is a line in the results, and not the end.
        resume: ``auto``: models that an earlier run with these settings and this code has evaluated
            in the same folder are not made again; or ``never``.
        references: whether the pretrained encoder and the experts themselves are evaluated too.
        analyses: names of analyses of every merge and its repairs at the first seed, ``all``, or
            null; their values are written to ``analysis.json``.
        analysis_images: images per task for them, of the test split.

    Raises:
        ConfigError: the first setting that does not fit.
    """

    bases: Annotated[Json, Field(min_length=1, description="a FusionBench method or more, by name")]
    methods: Annotated[
        dict[str, Json], Field(description="settings of intervmerge or surgery, by name")
    ]
    rivals: Annotated[dict[str, Json], Field(description="methods, by name")] = Field({})
    coefficients: Annotated[
        dict[str, Json] | None, Field(description="coefficients, by the base's name")
    ] = None
    train_coefficients: Annotated[
        dict[str, list[str]], Field(description="names of methods, by the base's name")
    ] = Field({})
    seeds: Annotated[
        list[Seed], Field(min_length=1, description="a list of whole numbers, 0 or more")
    ] = Field(default=[0])
    steps: Annotated[int | None, whole(0, 10**7, before="null, or ")] = None
    data: Annotated[Json | None, Field(description="null, or {split: validation, ...}")] = None
    images: Annotated[dict[str, Json], Field(description="images, by name")] = Field({})
    labels: Annotated[dict[str, int], Field(description="whole numbers, by name")] = Field({})
    keep_going: Flag = False
    resume: Literal["auto", "never"] = "auto"
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
        for name, methods in self.train_coefficients.items():
            with named("train_coefficients"):
                if name not in (self.coefficients or {}):
                    raise unknown_key(name, self.coefficients or {}, "base with coefficients")
                for method in methods:
                    if method not in self.methods:
                        raise unknown_key(method, self.methods, "method").under(name)
        DataSettings.read(self.data or {}, "data")
        for name, rival in self.rivals.items():
            check_method(rival, f"rivals.{name}")
            if name in self.bases:
                raise ConfigError(f"rivals.{name}", "a base has that name", "another name")
        known = [*self.bases, *self.rivals]
        for group in ("images", "labels"):
            for name in getattr(self, group):
                if name not in known:
                    raise unknown_key(name, known, "base or rival").under(group)
        for name, images in self.images.items():
            ImagesUsed.read(images, f"images.{name}")
        return self

    def needs(self, name: str) -> Json:
        """Fields of the result of a base or rival: the images it sees."""
        images = [ImagesUsed(**self.images[name])] if name in self.images else []
        return {"images": images, "labels": self.labels.get(name, 0)}

    def method(self, name: str) -> tuple[type[Repair], Json]:
        """The class that repairs by a method, and the method's settings, with those for all.

        Raises:
            ConfigError: its ``_target_`` is not a ``Repair``.
        """
        own = {key: value for key, value in self.methods[name].items() if value is not None}
        target = own.get("_target_")
        with named(f"methods.{name}"):
            cls = repair_class(own) if target else IntervMergeAlgorithm
            if cls is None:
                allowed = "a subclass of fusion_bench_intervmerge.model.protocols.Repair"
                raise ConfigError("_target_", f"{target} is not a repair", allowed)
        own = {key: value for key, value in own.items() if key not in _NOT_SETTINGS}
        fields = cls.Settings.model_fields
        if "base" not in fields:
            own.pop("base", None)
        if isinstance(data := own.get("data"), Mapping):  # null: the default, in every setting
            own["data"] = {key: value for key, value in data.items() if value is not None}
        if "steps" in fields and self.steps is not None and own.get("steps") != 0:
            own["steps"] = self.steps
        if "data" in fields and self.data is not None:
            own["data"] = {**own.get("data", {}), **self.data}
        return cls, own


@cache
def _code() -> str:
    """A digest of this package's code: another version gives other results."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def repair_class(config: Json) -> type[Repair] | None:
    """The class that a config's ``_target_`` names, if it is a repair.

    Raises:
        ConfigError: it cannot be imported, or is not a class.
    """
    try:
        cls = get_class(config["_target_"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("_target_", reason, "a repair") from error
    return cls if issubclass(cls, Repair) else None


class ComparisonAlgorithm(Method):
    """Merge by each base, repair each merge by each method and seed, evaluate all.

    Every method gets the same images, steps and merged encoder. FusionBench's report then has the
    accuracies of each model by name, and ``intervmerge.json`` beside it what each model is. A model
    is evaluated as soon as it is there, so that one at a time is in memory; its result is kept in
    the folder ``models`` beside the report, and the same command goes on behind the last one.
    """

    Settings = ComparisonSettings

    @one_line
    def __init__(self, **settings: object):
        super().__init__(**settings)
        for method in self.settings.methods:
            self._build(method)  # refused now, not after the merge
        for rival in self.settings.rivals:
            self._rival(rival)
        self._models: dict[str, object] = {}
        self._results: dict[str, Result] = {}
        self._problems: dict[str, str] = {}
        self._repairs: list[Repair] = []

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> dict[str, object]:
        """Returns every model's report by name; without a task pool, the models."""
        settings, pool = self.settings, ExpertPool(modelpool)
        check_task_pool(self._program, pool.family, pool.tasks)
        prepare_task_pool(self._program)
        tower = pool.first_tower()
        for method in settings.methods:
            with named(f"methods.{method}"):
                self._build(method).look_ahead(pool, tower)
        if settings.references:
            if not self._is_finished("pretrained"):
                pretrained = pool.pool.load_model("_pretrained_")
                self._finish("pretrained", pretrained, Result(kind="pretrained"))
            if not self._is_finished("experts"):
                experts = hosted(ExpertPerTask(pool), tower)
                self._finish("experts", experts, Result(kind="experts"))
        for name in settings.rivals:
            if self._is_finished(name):
                continue
            with self._going_on(name):
                log.info("running: %s", name)
                about = {"method": name, **settings.needs(name)}
                rival, pretrained = self._rival(name), pool.tower("_pretrained_")
                self._repair(rival, f"rivals.{name}", pool, pretrained, name, about)
        analyser = Analyser(settings.analyses, settings.analysis_images, "test", self.fabric.device)
        for name in settings.bases:
            models = self._merge_and_repair(pool, name)
            if models and self.fabric.is_global_zero:
                merged = models.pop(name)
                analyser.run(name, pool, merged, models, pool.tasks)
                analyser.write(Path(self.log_dir or "."), pool.tasks)
        self.write(pool.tasks, self._results, problems=self._problems)
        for repair in self._repairs:
            repair.clear()
        self._say_at_exit(pool.tasks)
        return self._models

    def _say_at_exit(self, tasks: Sequence[str]) -> None:
        """Print the results once FusionBench has printed its own report."""
        summarize_at_exit(self.log_dir)

    # -- one base --------------------------------------------------------------------------------

    def _merge_and_repair(self, pool: ExpertPool, base: str) -> dict[str, Any]:
        """Merge by a base and repair by each method and seed, as far as that is not finished.

        Returns:
            With analyses, what they compare: the merged encoder under the base's name, and one
            repair of each method under the method's.
        """
        repairs = {
            f"{base}/{method}" + ("" if seed is None else f"/seed{seed}"): (method, seed)
            for method in self.settings.methods
            for seed in (self.settings.seeds if self._build(method).seeded(pool) else [None])
            if self._starts_from(method, base)
        }
        there = self._is_finished(base)
        waiting = [name for name in repairs if not self._is_finished(name)]
        if there and not waiting:
            return {}
        with self._going_on(base):
            merged, start = self._merge(pool, base, there)
        if base in self._problems:
            return {}
        analysed: dict[str, Any] = {base: merged}
        for name in waiting:
            method, seed = repairs[name]
            log.info("repairing: %s", name)
            with self._going_on(name):
                changes: Json = {} if seed is None else {"seed": seed}
                if self._trains_coefficients(method, base):
                    changes["coefficients"] = {**(start or {}), "train": True}
                about = {"base": base, "method": method, "seed": seed}
                repair = self._build(method, **changes)
                model = self._repair(repair, f"methods.{method}", pool, merged, name, about)
                if self.settings.analyses is not None and isinstance(model, InterventionModel):
                    analysed.setdefault(method, model)
        pool.calibrated.clear()  # of use to the repairs of one merge alone
        return analysed if self.settings.analyses is not None else {}

    def _trains_coefficients(self, method: str, base: str) -> bool:
        always = self.settings.methods[method].get("coefficients")
        return bool(always) or method in self.settings.train_coefficients.get(base, [])

    def _starts_from(self, method: str, base: str) -> bool:
        """Whether the base has coefficients, if the method trains them."""
        known = base in (self.settings.coefficients or {})
        return known or not self._trains_coefficients(method, base)

    def _merge(
        self, pool: ExpertPool, name: str, there: bool = False
    ) -> tuple[VisionTower, Json | None]:
        """Merge by a base: the merged encoder, and the coefficients that reproduce it, if any.

        If it is ``there``, evaluated by an earlier run, it is not evaluated again.
        """
        started, base = time.perf_counter(), self.settings.bases[name]
        start, settings = (self.settings.coefficients or {}).get(name), None
        if start is not None and start.get("init") == "base":
            coefficients = run_adamerging(base, pool.pool, self.fabric, self._program)
            start = {**start, "init": coefficients.tolist()}
            settings = CoefficientSettings.read({**start, "train": False}, "coefficients")
        try:
            merged = merge(pool, base, settings, self.fabric, self._program).tower
        except ConfigError as error:
            if error.where != "base":
                raise
            raise ConfigError(f"bases.{name}", error.problem, error.allowed) from error
        if not there:
            result = Result(
                kind="merge",
                base=name,
                extra_parameters=0,
                bytes=0,
                seconds=time.perf_counter() - started,
                **self.settings.needs(name),
            )
            self._finish(name, copy.deepcopy(merged.library_model()), result)
        return merged, start

    def _repair(
        self,
        repair: Repair,
        where: str,
        pool: ExpertPool,
        merged: VisionTower,
        name: str,
        about: Json,
    ) -> nn.Module:
        started = time.perf_counter()
        self._repairs.append(repair)
        with named(where):
            model: Any = repair.repair(pool, copy.deepcopy(merged))
        about = {"seconds": time.perf_counter() - started, **about}
        result = repair.record(model).model_copy(update=about)
        self._finish(name, hosted(model, merged), result)
        return model

    # -- what is finished ------------------------------------------------------------------------

    def _finish(self, name: str, model: nn.Module, result: Result) -> None:
        """Evaluate a model and keep its report, if there is a task pool; else keep the model."""
        self._results[name] = result
        self._models[name] = model
        program: Any = self._program
        if not has_task_pool(program):
            return
        name_models(program, {name: model}, self.settings.bases)
        report = program.taskpool.evaluate(model)
        self._models[name] = report
        file, run = self._file(name), self._identity(name)
        if file is not None and run is not None:
            if self.fabric.is_global_zero:
                kept = {"run": run, "result": result.model_dump(exclude_defaults=True)}
                write_json(file, {**kept, "report": report}, indent=None)
            for repair in self._repairs:
                repair.clear()
            self._repairs.clear()

    def _is_finished(self, name: str) -> bool:
        """Whether an earlier run has evaluated a model, whose result is then taken over."""
        file, run = self._file(name), self._identity(name)
        if file is None or run is None or self.settings.analyses or self.settings.resume == "never":
            return False
        kept = read_json(file)
        if kept is None or kept.get("run") != run:
            return False
        log.info("finished by an earlier run: %s", name)
        self._results[name] = Result.read(kept["result"], str(file))
        self._models[name] = kept["report"]
        pool: Any = getattr(self._program, "taskpool", None)
        if hasattr(pool, "recall"):
            pool.recall(name)
        return True

    def _file(self, name: str) -> Path | None:
        return Path(self.log_dir) / "models" / f"{name}.json" if self.log_dir else None

    def _identity(self, name: str) -> str | None:
        """A digest of all that a model and its accuracies depend on; None: nothing tells."""
        base, _, method = name.partition("/")
        method = method.partition("/")[0]
        settings = self.settings
        pools = [getattr(self._program, key, None) for key in ("_modelpool", "_taskpool")]
        if not all(map(OmegaConf.is_config, pools)):
            return None
        facts = [
            name,
            settings.bases.get(base),
            settings.rivals.get(base),
            method and settings.method(method)[1],
            method and (settings.coefficients or {}).get(base),
            method and self._trains_coefficients(method, base),
            *map(plain, pools),
            str(getattr(self.fabric._precision, "precision", "")),
            self.fabric.world_size,
            RuntimeConstants.debug,
            _code(),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """With ``keep_going``, a failure inside is written down and the run goes on."""
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
        cls = None
        with suppress(ConfigError, KeyError):  # what cannot be imported fails when it runs
            cls = repair_class(config)
        own = {k: v for k, v in config.items() if k not in _NOT_SETTINGS}
        return self._built(f"rivals.{name}", cls, own if cls else {"method": config})

    def _build(self, method: str, **changes: object) -> Repair:
        """A method's repair, with the settings that hold for all."""
        cls, own = self.settings.method(method)
        return self._built(f"methods.{method}", cls, own | changes)

    def _built(self, where: str, cls: Any, settings: Json) -> Repair:
        with named(where):
            repair: Repair = (cls or FusionBenchMethod)(**settings)
        return attach(repair, self._program, self.fabric)
