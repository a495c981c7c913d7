"""Image embeddings whose forward pass waits until somebody needs a number.

FusionBench's CLIP task pool asks a vision model for its output, projects and normalises it, and
only then says which task the images belong to. Run at once, the pass would be the wrong one and a
second would follow. So the output is a tensor that has not been computed: projecting and
normalising it are put off with it, anything else computes it, as the merged encoder's output, which
is what a model without a task must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# What FusionBench does between the forward pass and naming the task.
_PUT_OFF = {F.linear, Tensor.norm, Tensor.__truediv__, Tensor.div, Tensor.__sub__, Tensor.sub}


class DeferredTensor(Tensor):
    """A tensor that is computed on first use.

    Attributes:
        images: what it will be computed from; whoever learns the task may start from them instead.
    """

    images: Tensor
    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def of(images: Tensor, compute: Callable[[], Tensor]) -> DeferredTensor:
        """A tensor that ``compute`` will give; it should run once, however many share it."""
        deferred = Tensor._make_subclass(DeferredTensor, torch.empty(0))
        deferred.images, deferred._compute, deferred._value = images, compute, None
        return deferred

    def value(self) -> Tensor:
        """The computed tensor."""
        # plain attribute access: ``__torch_function__`` is for tensors' own methods
        if self._value is None:
            self._value = self._compute()
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _PUT_OFF:
            source = next(a for a in args if isinstance(a, DeferredTensor))
            return cls.of(source.images, lambda: func(*map(_plain, args), **named))
        plain = {name: _plain(value) for name, value in named.items()}
        return func(*(_plain(a) for a in args), **plain)


def _plain(value: Any) -> Any:
    if isinstance(value, DeferredTensor):
        return value.value()
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value
