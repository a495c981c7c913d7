"""Merging a pool's experts: by any FusionBench method, or by coefficients of our own."""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from fusion_bench import BaseModelPool
from fusion_bench.constants import RuntimeConstants
from fusion_bench.utils import instantiate
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ConfigError
from ..encoders.base import VisionTower
from ..files import atomic_file, cache_root
from ..merging import CoefficientSettings, Mixture, initial_coefficients, mix
from .host import attach, prints_in_the_log
from .pools import ExpertPool, checked_loads

log = logging.getLogger(__name__)

# fusion-bench 0.2.33: these add a state dict of parameters to one of tensors, which its own
# arithmetic of state dicts refuses, so that they run with no pool.
WANT_TENSORS = tuple(
    f"fusion_bench.method.{package}."
    for package in ("fw_merging", "rankone_moe", "sparse_we_moe", "tall_mask", "we_moe")
)


def merge_experts(
    pool: ExpertPool,
    base: object,
    coefficients: CoefficientSettings | None,
    fabric: Fabric,
    program: object = None,
    keep: bool = True,
) -> tuple[VisionTower, Mixture | None]:
    """The merged encoder, and the mixture it came from if ``coefficients`` are set.

    Args:
        pool: the experts; a merged model in it is taken as it is.
        base: config of a FusionBench method, or a method object.
        coefficients: merge by these instead, starting from their ``init``.
        fabric, program: shared with the nested method.
        keep: whether to take the coefficients of an earlier run of AdaMerging.

    Raises:
        ConfigError: nothing merges, or models that do not fit each other.
    """
    if coefficients is not None:
        tower, start = pool.tower("_pretrained_"), coefficients.init
        if start == "base":
            start = run_adamerging(base, pool.pool, fabric, program, keep)
        sizes = len(pool.tasks), len(tower.mergeable())
        init = initial_coefficients(start, *sizes, coefficients.granularity)
    elif pool.pool.has_merged:
        log.info("the pool has a merged model: it is repaired, and `base` is not run")
        return pool.tower("_merged_"), None
    elif base is None:
        raise ConfigError("base", "nothing merges the experts", "a FusionBench method")
    try:
        if coefficients is not None:
            return tower, mix(tower, map(pool.tower, pool.tasks), init, coefficients)
        model = run_base(base, pool.pool, fabric, program)
    except (RuntimeError, ValueError, KeyError):
        pool.check_shapes()  # the likeliest reason, and the words for it are many
        raise
    except TypeError as error:
        raise ConfigError(
            "base", f"the method failed ({error})", "settings of its types"
        ) from error
    return pool.wrap(model.to("cpu")), None


def run_base(config: object, pool: BaseModelPool, fabric: Fabric, program: object) -> nn.Module:
    """Run a nested method as ``run_method`` does, and return the merged model.

    Raises:
        ConfigError: the config names no method, or the method does not give a single model.
    """
    merged = run_method(config, pool, fabric, program)
    if not isinstance(merged, nn.Module):
        problem = f"it gives a {type(merged).__name__}"
        raise ConfigError("base", problem, "a method that gives one merged model")
    return merged


def run_method(config: object, pool: BaseModelPool, fabric: Fabric, program: object) -> object:
    """Run a nested method on a pool and return what it returns.

    A method object is taken, and configs of both kinds: with ``_target_``, and the older ones that
    FusionBench finds by their ``name``.

    Raises:
        ConfigError: the config names no method.
    """
    method: Any = config
    if isinstance(config, Mapping):
        if not isinstance(config, DictConfig):
            config = OmegaConf.create(dict(config))
        if isinstance(cache := config.get("cache_dir"), str):
            # fusion-bench 0.2.33: the task-wise AdaMerging writes into it, and does not make it
            Path(cache).mkdir(parents=True, exist_ok=True)
        if "_target_" in config:
            method = instantiate(config, _recursive_=config.get("_recursive_", False))
        elif "name" in config:
            from fusion_bench.compat.method import load_algorithm_from_config

            method = load_algorithm_from_config(config)
        else:
            raise ConfigError("base", "names no method", "method@method.base=task_arithmetic, ...")
    if pool.has_instance_models:
        # Methods merge into the models they are given, and these are the user's.
        pool = copy.copy(pool)
        pool._models = {str(n): copy.deepcopy(model) for n, model in pool._models.items()}
    pool = checked_loads(pool)
    if type(method).__module__.startswith(WANT_TENSORS):
        pool = _with_tensors(pool)
    attach(method, program, fabric)
    with prints_in_the_log():
        getattr(method, "on_run_start", lambda: None)()  # older methods have neither
        result = method.run(pool)
        getattr(method, "on_run_end", lambda: None)()
    return result


def _with_tensors(pool: BaseModelPool) -> BaseModelPool:
    """The pool with models whose state dicts hold tensors, never parameters."""

    def load(name: str, *args: object, **kwargs: object) -> nn.Module:
        model = pool.load_model(name, *args, **kwargs)
        kind = type(model)

        def state_dict(self: nn.Module, **options: Any) -> dict[str, Tensor]:
            return kind.state_dict(self, **options | {"keep_vars": False})

        # a class of its own, so that copies of the model have it too
        model.__class__ = type(kind.__name__, (kind,), {"state_dict": state_dict})
        return model

    tensors: Any = copy.copy(pool)
    tensors.load_model = load
    return tensors


def run_adamerging(
    config: object, pool: BaseModelPool, fabric: Fabric, program: object, keep: bool = True
) -> Tensor:
    """Run one of FusionBench's AdaMerging methods for its coefficients, once per pool and method.

    They are kept in the cache folder, so that all runs of a study start from the same ones.

    Args:
        config, pool, fabric, program: as in ``run_base``.
        keep: whether to take the coefficients of an earlier run of the same method and pool.

    Returns:
        (tasks,) or (tasks, parameter tensors).

    Raises:
        ConfigError: the method does not save coefficients.
    """
    if not isinstance(config, Mapping) or "save_merging_weights" not in config:
        raise ConfigError(
            "coefficients.init",
            "`base` is not an AdaMerging method, so it gives no coefficients",
            "method@method.base=adamerging/clip, a number, or a file",
        )

    def find() -> Tensor:
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "merging_weights.pt"
            saving = OmegaConf.merge(config, {"save_merging_weights": str(file)})
            run_base(saving, pool, fabric, program)
            return torch.load(file, weights_only=True)

    if not keep or pool.has_instance_models:  # nothing tells one live module from another
        return find()
    facts = [  # all that the coefficients depend on
        OmegaConf.to_yaml(config, resolve=True),
        *(f"{name}: {pool._models[name]}" for name in pool.all_model_names),
        str(pool._test_datasets),
        version("fusion-bench"),
        str(RuntimeConstants.debug),  # a dry run of a few steps
    ]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]
    folder = cache_root() / "coefficients"
    path = folder / f"{key}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        try:
            coefficients = load_file(path)["coefficients"]
            log.info("AdaMerging's coefficients are those of an earlier run, %s", path)
        except (FileNotFoundError, SafetensorError, KeyError):
            coefficients = find()
            with atomic_file(path) as temporary:
                save_file({"coefficients": coefficients}, temporary)
        return coefficients
