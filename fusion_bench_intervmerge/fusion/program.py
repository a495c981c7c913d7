"""What FusionBench's program hands to a method, and does around it."""

from __future__ import annotations

from typing import Any

from fusion_bench.taskpool import DummyTaskPool
from omegaconf import OmegaConf


def plain(value: Any) -> Any:
    """A piece of Hydra's config as plain containers, interpolations resolved; else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def has_task_pool(program: Any) -> bool:
    """Whether the program will evaluate what its method returns."""
    pool = getattr(program, "taskpool", None)
    return pool is not None and not isinstance(pool, DummyTaskPool)
