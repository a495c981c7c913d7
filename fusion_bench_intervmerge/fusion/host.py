"""What FusionBench's program hands to a method, and does around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fusion_bench.taskpool import CLIPVisionModelTaskPool, DummyTaskPool
from omegaconf import OmegaConf

from ..config import HOST_KEYS, ConfigError


def plain(value: Any) -> Any:
    """A piece of Hydra's config as plain containers, interpolations resolved; else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def has_task_pool(program: object) -> bool:
    """Whether the program will evaluate what its method returns."""
    pool = getattr(program, "taskpool", None)
    return pool is not None and not isinstance(pool, DummyTaskPool)


T = TypeVar("T")


def adopted(method: T, program: object, fabric: object) -> T:
    """A nested method, which gets the program and the fabric that runs it, where it takes them."""
    for name, value in (("_program", program), ("_fabric_instance", fabric), ("_fabric", fabric)):
        if hasattr(method, name):
            setattr(method, name, value)
    return method


def check_task_pool(program: object, family: str) -> None:
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


def split_settings(
    given: Mapping[str, object], **more: object
) -> tuple[dict[str, object], dict[str, Any]]:
    """What a method was given: its settings as plain containers, and the host's own keys."""
    settings = {key: plain(value) for key, value in (more | dict(given)).items()}
    return settings, {key: settings.pop(key) for key in HOST_KEYS if key in settings}
