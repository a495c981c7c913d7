"""One task's edits: which function acts where, and of which rank; and several tasks' at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import named
from ..data import generator_of
from .config import InterventionConfig
from .functions import Function, build_function
from .placement import Placement

Ranks = Mapping[str, Mapping[str, int]]  # site -> block -> rank


class Edits(nn.ModuleDict):
    """One task's edits: ``"<site> <block>"`` -> function; a block without an edit is left out.

    ``seed`` and ``task`` decide the starting values.

    Raises:
        ConfigError: a rank that does not fit, or a start that the form does not have.
    """

    def __init__(
        self,
        configs: Mapping[str, InterventionConfig],
        placements: Mapping[str, Placement],
        ranks: Ranks,
        seed: int,
        task: str,
    ):
        super().__init__()
        self._configs, self._placements = dict(configs), dict(placements)
        generator = generator_of(seed, task)
        for site, config in configs.items():
            for block in placements[site].blocks:
                if rank := ranks.get(site, {}).get(str(block)):
                    self.put(site, block, self._build(site, rank, config.init, generator))

    def set_rank(self, site: str, block: int, rank: int) -> Function | None:
        """Put a fresh edit of another rank at a place, at its published start; 0: none.

        Raises:
            ConfigError: a rank that does not fit.
        """
        generator = torch.Generator().manual_seed(0)
        function = self._build(site, rank, "reference", generator) if rank else None
        self.put(site, block, function)
        return function

    def _build(self, site: str, rank: int, init: str, generator: torch.Generator) -> Function:
        config, placement = self._configs[site], self._placements[site]
        with named(f"interventions.{site}"):
            return build_function(
                config.function,
                placement.width,
                rank,
                copies=placement.copies,
                activation=config.activation,
                init=init,
                generator=generator,
            )

    def at(self, site: str, block: int | str) -> Function | None:
        """The edit at a place; None if there is none."""
        return cast("Function | None", self._modules.get(f"{site} {block}"))

    def put(self, site: str, block: int | str, function: Function | None) -> None:
        """Replace the edit at a place; None: no edit there."""
        if function is None:
            self._modules.pop(f"{site} {block}", None)
        else:
            self[f"{site} {block}"] = function

    def places(self) -> Iterator[tuple[str, str, Function]]:
        """Site, block and function of every edit."""
        for place, function in self.items():
            site, block = place.split()
            yield site, block, cast(Function, function)

    def ranks(self) -> dict[str, dict[str, int]]:
        """Site -> block -> rank."""
        ranks: dict[str, dict[str, int]] = {site: {} for site in self._configs}
        for site, block, function in self.places():
            ranks[site][block] = function.rank
        return ranks

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the formulas, named ``<site>.<block>.<tensor>``."""
        return {
            f"{site}.{block}.{name}": tensor
            for site, block, function in self.places()
            for name, tensor in function.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors that are named as ``tensors`` names them."""
        for site, block, function in self.places():
            function.load({n: tensors[f"{site}.{block}.{n}"] for n in function.tensors()})


def edit_together(
    functions: Sequence[Function | None], ids: Tensor | None, vectors: Tensor
) -> Tensor:
    """Apply the edits of several tasks at one place to one batch.

    Args:
        functions: one per task; None for a task without an edit here. At least one has an edit.
        ids: for each image the index of its task; None if the images follow one another in equal
            groups, one per task.
        vectors: (batch, chosen tokens, chosen width).
    """
    form = next(function for function in functions if function is not None)
    tensors = stacked(functions)
    if ids is None:
        grouped = vectors.unflatten(0, (len(functions), -1))
    else:
        grouped, tensors = vectors, {name: tensor[ids] for name, tensor in tensors.items()}
    terms = form.prepared(tensors, vectors.dtype)
    if form.copies is not None:
        grouped = grouped.unsqueeze(-2)
        if ids is None:
            terms = {name: term.unsqueeze(1) for name, term in terms.items()}
    elif ids is None:
        grouped = grouped.flatten(1, 2)
    return form.edit(grouped, **terms).reshape(vectors.shape)


def stacked(functions: Sequence[Function | None]) -> dict[str, Tensor]:
    """The functions' tensors side by side, one set per task.

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
