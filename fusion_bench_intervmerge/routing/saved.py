"""A router from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .reading import Reading
from .routers import Router, router_class
from .settings import RouterSettings


def read_router(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tasks: Sequence[str]
) -> Router:
    """What ``Router.config`` and ``Router.tensors`` gave.

    Args:
        config: its settings.
        tensors: by name; ``reading.<tensor>`` and ``tasks.<task>.<tensor>``.
        tasks: of the model.

    Raises:
        ValueError: what does not fit, in one line.
    """
    settings = RouterSettings.read(config, "router")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = tensor.float()
    router = router_class(settings.name)(Reading.of(groups.pop("reading", {})), settings)
    # in the model's order, which the file does not keep
    for task in tasks:
        if f"tasks.{task}" in groups:
            router.load(task, groups.pop(f"tasks.{task}"))
    for group in groups:
        raise ValueError(f"{group} belongs to none of the model's tasks")
    if not router.tasks:
        raise ValueError("it knows no task")
    return router
