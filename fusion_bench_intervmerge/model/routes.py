"""Whose edits a forward pass applies.

A forward pass is told so beside its images. What it is told belongs to the running code and not to
the model, so that threads may encode for different tasks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..interventions.edits import Stacked

T = TypeVar("T")


class Told(Generic[T]):
    """What the running code says of each model, by a key of the model's."""

    def __init__(self, name: str):
        nothing: Mapping[object, T] = MappingProxyType({})
        self._variable: ContextVar[Mapping[object, T]] = ContextVar(name, default=nothing)

    def get(self, model: object) -> T | None:
        return self._variable.get().get(model)

    @contextmanager
    def saying(self, model: object, value: T) -> Iterator[None]:
        """It holds for the code inside, in the running thread."""
        token = self._variable.set({**self._variable.get(), model: value})
        try:
            yield
        finally:
            self._variable.reset(token)


@dataclass
class Route:
    """Whose edits the running forward pass applies.

    Attributes:
        apply: the model's ``apply_edit``; a shallow copy shares its hooks.
        tasks: the tasks that occur in the batch; none for the merged encoder.
        ids: for each image the index of its task in ``tasks``; None when there is one task, and
            when the tasks follow one another in equal groups of images.
        stacked: the tasks' edits side by side, by site and block, once they were needed.
    """

    apply: Callable[[str, int, Tensor], Tensor]
    tasks: list[str]
    ids: Tensor | None = None
    stacked: dict[tuple[str, int], Stacked] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        apply: Callable[[str, int, Tensor], Tensor],
        task: str | Sequence[str] | None,
        batch: int | None,
        device: torch.device,
    ) -> Route:
        """For one task, for one task an image, or for none.

        Raises:
            ValueError: not one task an image.
        """
        if task is None or isinstance(task, str):
            return cls(apply, [] if task is None else [task])
        if batch is not None and len(task) != batch:
            raise ValueError(
                f"{len(task)} tasks are named for {batch} images; one an image is needed"
            )
        tasks = list(dict.fromkeys(task))
        order = {name: index for index, name in enumerate(tasks)}
        ids = torch.tensor([order[name] for name in task])
        groups = torch.arange(len(tasks)).repeat_interleave(len(ids) // max(1, len(tasks)))
        return cls(apply, tasks, None if torch.equal(ids, groups) else ids.to(device))
