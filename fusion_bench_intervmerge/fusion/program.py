"""What FusionBench's program hands to a method, and does around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, TypeVar

from fusion_bench.taskpool import CLIPVisionModelTaskPool, DummyTaskPool
from omegaconf import OmegaConf

from ..errors import ConfigError, unknown_key
from ..settings import shown


def plain(value: Any) -> Any:
    """A piece of Hydra's config as plain containers, interpolations resolved; else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def has_task_pool(program: Any) -> bool:
    """Whether the program will evaluate what its method returns."""
    pool = getattr(program, "taskpool", None)
    return pool is not None and not isinstance(pool, DummyTaskPool)


T = TypeVar("T")


def adopted(method: T, program: Any, fabric: Any) -> T:
    """A nested method, which gets the program and the fabric that runs it, where it takes them."""
    for name, value in (("_program", program), ("_fabric_instance", fabric), ("_fabric", fabric)):
        if hasattr(method, name):
            setattr(method, name, value)
    return method


def check_task_pool(program: Any, family: str) -> None:
    """Make sure, before the training, that the task pool can evaluate encoders of this family.

    Raises:
        ConfigError: it evaluates those of the other one, or never names a task.
    """
    pool = getattr(program, "taskpool", None)
    # FusionBench's OpenCLIP task pool is not imported for this: it cannot be before Python 3.12.
    theirs = "openclip" if hasattr(pool, "_classifier_heads") else "huggingface"
    if (theirs == "openclip" or isinstance(pool, CLIPVisionModelTaskPool)) and theirs != family:
        names = {"openclip": "OpenCLIP", "huggingface": "Hugging Face"}
        raise ConfigError(
            "taskpool",
            f"it evaluates {names[theirs]} encoders, and the models are {names[family]}'s",
            "the task pool of the same name as the model pool",
        )
    if theirs == "openclip" and type(pool).__module__.startswith("fusion_bench."):
        raise ConfigError(
            "taskpool",
            "it never names the task to a model, so its report would show the merged encoder",
            "taskpool=openclip-vit-b32_TA8, or another of this package's",
        )


# FusionBench's own, which any of its configs may carry.
HOST_KEYS = ("_recursive_", "_usage_", "_version_")


def split_settings(given: Mapping[str, Any], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a method was given: its settings as plain containers, and the host's own keys."""
    settings = {key: plain(value) for key, value in (more | dict(given)).items()}
    return settings, {key: settings.pop(key) for key in HOST_KEYS if key in settings}


def check_arguments(cls: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    """Check a config's arguments of a class that checks few of them itself.

    Raises:
        ConfigError: a key that the class does not take, a value of another kind than its
            default's, or a number that is not finite.
    """
    parameters = inspect.signature(cls).parameters
    known = [name for name in parameters if name != "params"]
    for key, value in given.items():
        if key not in known:
            raise unknown_key(key, known).under(where)
        default, annotation = parameters[key].default, str(parameters[key].annotation)
        fits, allowed = not _has_nan(value), "finite numbers"
        if isinstance(default, bool):
            fits, allowed = isinstance(value, bool), "true, false"
        elif default is None and "bool" in annotation:
            fits, allowed = value is None or isinstance(value, bool), "null, true, false"
        elif isinstance(default, (int, float)):
            fits, allowed = fits and _is_number(value), "a number"
        elif isinstance(default, tuple):
            fits = fits and isinstance(value, list) and len(value) == len(default)
            allowed = f"a list of {len(default)}"
        if not fits:
            raise ConfigError(f"{where}.{key}", shown(value), allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_nan(value: Any) -> bool:
    """Whether it is, or holds, a number that is not finite."""
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return isinstance(value, float) and not isfinite(value)
