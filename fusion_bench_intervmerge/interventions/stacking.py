"""The edits of several tasks at one place, applied to one batch in one go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .functions import Function


class Stacked:
    """The edits of a batch's tasks.

    Args:
        functions: one a task; None for a task without an edit here. One of them at least is there.
        ids: for each image the index of its task; None where the images follow one another in equal
            groups, one a task.
    """

    def __init__(self, functions: Sequence[Function | None], ids: Tensor | None):
        self._form = next(function for function in functions if function is not None)
        self._count, self._mixed = len(functions), ids is not None
        tensors = stacked(functions)
        self._tensors = tensors if ids is None else {n: t[ids] for n, t in tensors.items()}

    def __call__(self, vectors: Tensor) -> Tensor:
        """Edit (batch, chosen tokens, chosen width), one leading entry of the tensors a group."""
        terms, copies = self._form.prepared(self._tensors, vectors.dtype), self._form.copies
        grouped = vectors if self._mixed else vectors.unflatten(0, (self._count, -1))
        if copies is not None:
            grouped = grouped.unsqueeze(-2)
            if not self._mixed:
                terms = {name: term.unsqueeze(1) for name, term in terms.items()}
        elif not self._mixed:
            grouped = grouped.flatten(1, 2)
        return self._form.edit(grouped, **terms).reshape(vectors.shape)


def stacked(functions: Sequence[Function | None]) -> dict[str, Tensor]:
    """The functions' tensors side by side, a set a task.

    Ranks may differ, and a task may have no edit: rows of zeros take part in no formula.
    """
    by_task = [{} if function is None else function.tensors() for function in functions]
    largest = max((t for t in by_task if t), key=lambda t: sum(x.numel() for x in t.values()))
    return {
        name: torch.stack([_padded(tensors.get(name), tensor) for tensors in by_task])
        for name, tensor in largest.items()
    }


def _padded(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor with zeros behind it in every dimension, up to another's shape."""
    if tensor is None:
        return torch.zeros_like(like)
    if tensor.shape == like.shape:
        return tensor
    missing = [large - own for large, own in zip(like.shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for count in reversed(missing) for n in (0, count)])
