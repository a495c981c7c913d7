"""``fusion_bench method=calibration`` and ``method=featcal``: better weights for a merged encoder.

Each has a ``base`` that merges, gives an encoder of the pool's own class, and can itself be the
base of a repair: settings that are null are then the repair's, so that both see the same images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.utils import instantiate
from torch import nn

from ..calibration import CalibrationSettings, calibrate
from ..config import Json
from ..data import RepairSettings, RunFolder
from ..encoders.base import VisionTower
from ..files import cache_root
from ..results import ImagesUsed, Result, Results
from .featcal import FeatCalSettings, featcal
from .host import check_task_pool, host_in_the_log, one_line, plain, split_settings
from .merge import merge_experts
from .pools import ExpertPool
from .records import base_name
from .screen import announce
from .settings import check_method

# what is null in a method that runs by itself: none of the images that are tested
ALONE: Json = {"split": "train", "images": 512}


class WeightsAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Merge experts, then replace weights of the merged encoder, from images of all tasks.

    Args:
        base: config of the FusionBench method that merges; a ``_merged_`` model in the pool wins
            over it.
        settings: those of ``Settings``. Of ``data`` and ``seed`` null means: as in the method that
            this is the base of, else the default, ``ALONE``.

    Raises:
        ConfigError: a setting that does not exist, or not with that value.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[RepairSettings]]
    solve: ClassVar[Callable[..., VisionTower]]

    @one_line
    def __init__(self, base: object = None, **settings: object):
        given, host = split_settings(settings)
        super().__init__(**host)
        self.base = plain(base)
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
        images = {task: pool.images(task, settings.data.split) for task in pool.tasks}
        merged, _ = merge_experts(pool, self.base, None, self.fabric, self._program)
        used = self.images_used()
        if self.fabric.is_global_zero:
            announce(f"{self.name.capitalize()}: {used[-1].in_words()}")
        pretrained = pool.tower("_pretrained_")
        experts = {task: partial(pool.tower, task) for task in pool.tasks}
        states = self._states(pool, merged)
        more = {"fabric": self.fabric, "states": states}
        tower = type(self).solve(merged, pretrained, experts, images, settings, **more)
        if self.fabric.is_global_zero:
            if states is not None:
                states.clear()
            base = "merged" if pool.pool.has_merged else base_name(self.base)
            result = Result(
                kind="merge",
                base=base,
                method=self.name,
                seed=settings.seed,
                settings={"base": self.base, **settings.to_dict()},
                extra_parameters=0,
                bytes=0,
                labels=0,
                needs_task=False,
                passes=1.0,
                images=used,
            )
            Results(tasks=list(pool.tasks), models={f"{base}/{self.name}": result}).write(
                self.log_dir
            )
        return tower.library_model()

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

    def _states(self, pool: ExpertPool, merged: VisionTower) -> RunFolder | None:
        """Where finished blocks are kept; nowhere for live models, which nothing tells apart."""
        if pool.pool.has_instance_models:
            return None
        facts = {
            "method": self.name,
            "settings": self.settings.to_dict(),
            "merged": merged.digest(),
            **pool.identity(["_pretrained_", *pool.tasks], self.settings.data.split),
            "precision": str(getattr(self.fabric._precision, "precision", "")),
            "processes": self.fabric.world_size,
        }
        run = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
        return RunFolder(cache_root() / "states" / run, run)


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


def images_of(base: object) -> list[ImagesUsed]:
    """The images that a base sees: none, unless it is one of these methods."""
    if not isinstance(base, Mapping) or base.get("_target_") not in METHODS:
        return []
    used: list[ImagesUsed] = instantiate(base, _recursive_=False).images_used()
    return used
