"""``fusion_bench method=calibration`` and ``method=featcal``: better weights for a merged encoder.

Each has a ``base`` that merges, gives an encoder of the pool's own class, and can itself be the
base of a repair: settings that are null are then the repair's, so that both see the same images.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.utils import instantiate
from lightning import Fabric
from torch import nn

from ..calibration import CalibrationSettings, calibrate
from ..config import ConfigError, Json
from ..data import RepairSettings, RunFolder, choose_images
from ..encoders.base import VisionTower
from ..files import cache_root
from ..merging import CoefficientSettings, Mixture
from ..model.protocols import Repair
from ..results import ImagesUsed, Result, Results
from .featcal import FeatCalSettings, featcal
from .host import (
    after_evaluation,
    attach,
    check_task_pool,
    host_in_the_log,
    name_models,
    one_line,
    plain,
    split_settings,
)
from .merge import merge_experts
from .pools import ExpertPool, prepare_task_pool
from .records import announce, base_name, summarize_at_exit
from .settings import check_method

# what is null in a method that runs by itself: none of the images that are tested
ALONE: Json = {"split": "train", "images": 512}


class WeightsAlgorithm(LightningFabricMixin, BaseAlgorithm, Repair):
    """Merge experts, then replace weights of the merged encoder, from images of all tasks.

    Args:
        base: config of the FusionBench method that merges; a ``_merged_`` model in the pool wins
            over it.
        references: whether the merge and, if it is at hand, the pretrained encoder are evaluated
            too.
        settings: those of ``Settings``. Of ``data`` and ``seed`` null means: as in the method that
            this is the base of, else the default, ``ALONE``.

    Raises:
        ConfigError: a setting that does not exist, or not with that value.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[RepairSettings]]
    solve: ClassVar[Callable[..., VisionTower]]

    @one_line
    def __init__(self, base: object = None, references: bool = True, **settings: object):
        given, host = split_settings(settings)
        super().__init__(**host)
        if not isinstance(references, bool):
            raise ConfigError("references", f"{references!r}", "true, false")
        self.base, self.references = plain(base), references
        check_method(self.base, "base")
        if isinstance(data := given.pop("data", {}), Mapping):
            data = ALONE | {key: value for key, value in data.items() if value is not None}
        if given.get("seed", 0) is None:
            del given["seed"]
        self.settings: Any = self.Settings.read({**given, "data": data})
        self.base = nested_in(self.base, self.settings)

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """The merged encoder with other weights, as the pool's own models are.

        Raises:
            ConfigError: a setting or a pool that does not fit, in one line.
        """
        pool, settings = ExpertPool(modelpool), self.settings
        check_task_pool(self._program, pool.family, pool.tasks)
        self.look_ahead(pool, pool.first_tower())
        prepare_task_pool(self._program)
        below = merge(pool, self.base, None, self.fabric, self._program)
        if self.fabric.is_global_zero:
            announce(f"{self.name.capitalize()}: {self.images_used()[-1].in_words()}")
        model = self.over(pool, below).tower.library_model()
        after_evaluation(self._program, lambda: None, below.models() if self.references else {})
        name, base = f"{below.name}/{self.name}", below.name
        if self.fabric.is_global_zero:
            more = {"base": base, "settings": {"base": self.base, **settings.to_dict()}}
            result = self.record(model)
            result = result.model_copy(update={"method": self.name, **more})
            Results(tasks=list(pool.tasks), models={name: result}).write(self.log_dir)
        name_models(self._program, {name: model})
        summarize_at_exit(self.log_dir)
        return model

    def look_ahead(self, pool: Any, tower: VisionTower) -> None:
        """Refuse images that are not found."""
        for task in pool.tasks:
            pool.images(task, self.settings.data.split)

    def seeded(self, pool: Any) -> bool:
        """A seed decides which images are taken, unless all are."""
        return any(
            len(choose_images(task, count, self.settings.data)) < count
            for task in pool.tasks
            for count in [len(pool.images(task, self.settings.data.split))]
        )

    def repair(self, pool: Any, merged: VisionTower) -> nn.Module:
        """A merged encoder with other weights, as the pool's own models are."""
        return self.solve_weights(pool, merged).library_model()

    def over(self, pool: ExpertPool, below: Merged) -> Merged:
        """What a merge becomes."""
        return Merged(self.name, self.solve_weights(pool, below.tower), below=below)

    def solve_weights(self, pool: ExpertPool, merged: VisionTower) -> VisionTower:
        """A merged encoder with other weights; solved once for all repairs of a comparison."""
        run = self._identity(pool, merged)
        if run not in pool.calibrated:
            settings = self.settings
            images = {task: pool.images(task, settings.data.split) for task in pool.tasks}
            experts = {task: partial(pool.tower, task) for task in pool.tasks}
            # nothing tells one live model from another
            keep = not pool.pool.has_instance_models
            states = RunFolder(cache_root() / "states" / run, run) if keep else None
            pretrained = pool.tower("_pretrained_")
            more = {"fabric": self.fabric, "states": states}
            solved = type(self).solve(merged, pretrained, experts, images, settings, **more)
            pool.calibrated[run] = solved
            if states is not None and self.fabric.is_global_zero:
                states.clear()
        return copy.deepcopy(pool.calibrated[run])

    def record(self, model: object) -> Result:
        return Result(
            kind="repair",
            method=self.name,
            seed=self.settings.seed,
            settings=self.settings.to_dict(),
            extra_parameters=0,
            bytes=0,
            labels=0,
            needs_task=False,
            passes=1.0,
            images=self.images_used(),
        )

    def images_used(self) -> list[ImagesUsed]:
        """The images that the weights are solved on, those of a nested base first."""
        data, seed = self.settings.data, self.settings.seed
        return [
            *images_of(self.base),
            ImagesUsed(
                split=data.split,
                fraction=data.fraction,
                at_most=data.images,
                solved=True,
                seed=seed,
                transductive=data.split == "test",
            ),
        ]

    def _identity(self, pool: ExpertPool, merged: VisionTower) -> str:
        """A digest of everything that the weights depend on."""
        facts = {
            "method": self.name,
            "settings": self.settings.to_dict(),
            "merged": merged.digest(),
            **pool.identity(["_pretrained_", *pool.tasks], self.settings.data.split),
            "precision": str(getattr(self.fabric._precision, "precision", "")),
            "processes": self.fabric.world_size,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


class CalibrationAlgorithm(WeightsAlgorithm):
    """``calibrate`` as a FusionBench method."""

    name = "calibration"
    Settings = CalibrationSettings
    solve = calibrate


class FeatCalAlgorithm(WeightsAlgorithm):
    """``featcal`` as a FusionBench method."""

    name = "featcal"
    Settings = FeatCalSettings
    solve = featcal


METHODS = {
    f"fusion_bench_intervmerge.fusion.{cls.__name__}": cls
    for cls in (CalibrationAlgorithm, FeatCalAlgorithm)
}


def nested_in(base: object, around: RepairSettings) -> object:
    """A base's config whose images and seed, as far as they are null, are those of the method
    around it.
    """
    config = plain(base)
    if not isinstance(config, dict) or config.get("_target_") not in METHODS:
        return base
    data = config.get("data") or {}
    ours = {key: getattr(around.data, key) for key, value in data.items() if value is None}
    seed = around.seed if config.get("seed") is None else config["seed"]
    return {**config, "data": {**data, **ours}, "seed": seed}


def weights_method(base: object) -> WeightsAlgorithm | None:
    """The method that a base's config is of, if it is one of these."""
    if not isinstance(base, Mapping) or base.get("_target_") not in METHODS:
        return None
    method: WeightsAlgorithm = instantiate(base, _recursive_=False)
    return method


def images_of(base: object) -> list[ImagesUsed]:
    """The images that a base sees: none, unless it is one of these methods."""
    method = weights_method(base)
    return [] if method is None else method.images_used()


@dataclass(frozen=True)
class Merged:
    """A merged encoder, and what it is made of.

    Attributes:
        name: of the method that made it, as results call it.
        tower: the encoder.
        mixture: of what coefficients, if they are set.
        below: the merge that has other weights now, if it has.
    """

    name: str
    tower: VisionTower
    mixture: Mixture | None = None
    below: Merged | None = None

    def models(self) -> dict[str, nn.Module]:
        """Name -> model of this merge and of those below, the lowest first."""
        below = {} if self.below is None else self.below.models()
        return {**below, self.name: self.tower.library_model()}


def merge(
    pool: ExpertPool,
    base: object,
    coefficients: CoefficientSettings | None,
    fabric: Fabric,
    program: object = None,
    keep: bool = True,
    where: str = "method.base",
) -> Merged:
    """Merge a pool's experts; arguments as in ``merge_experts``, ``where`` being the base's key."""
    weights = None if coefficients is not None else weights_method(base)
    if weights is not None:
        attach(weights, program, fabric)
        below = merge(pool, weights.base, None, fabric, program, keep, f"{where}.base")
        return weights.over(pool, below)
    tower, mixture = merge_experts(pool, base, coefficients, fabric, program, keep)
    return Merged(merge_name(pool, base, coefficients, where), tower, mixture)


def merge_name(pool: ExpertPool, base: object, coefficients: object, where: str) -> str:
    """What results call a merge."""
    if coefficients is not None:
        return "coefficients"
    return "merged" if pool.pool.has_merged else base_name(base, where)
