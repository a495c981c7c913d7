"""What FusionBench's program does around a method."""

from __future__ import annotations

from typing import Any

from fusion_bench.taskpool import DummyTaskPool


def has_task_pool(program: Any) -> bool:
    """Whether the program will evaluate what its method returns."""
    pool = getattr(program, "taskpool", None)
    return pool is not None and not isinstance(pool, DummyTaskPool)
