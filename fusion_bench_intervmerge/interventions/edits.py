"""One task's edits: which function stands where, and of which rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .config import InterventionConfig
from .functions import Function, build_function
from .placement import Placement

Ranks = Mapping[str, Mapping[str, int]]  # site -> block -> rank


class Edits(nn.ModuleDict):
    """One task's edits: site -> block -> function; a block without an edit is left out.

    Args:
        configs: site -> settings.
        placements: site -> where.
        ranks: of the edits.
        seed, task: decide the starting values.

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
        digest = hashlib.sha256(f"{seed} {task}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        super().__init__({site: nn.ModuleDict() for site in configs})
        self._configs, self._placements = dict(configs), dict(placements)
        for site, config in configs.items():
            init = "reference" if config.init == "regression" else config.init
            for block in placements[site].blocks:
                if rank := ranks.get(site, {}).get(str(block)):
                    self.put(site, block, self._built(site, rank, init, generator))

    def set_rank(self, site: str, block: int, rank: int) -> Function | None:
        """Put a fresh edit of another rank at a place, at its published start; 0: none.

        Raises:
            ConfigError: a rank that does not fit.
        """
        generator = torch.Generator().manual_seed(0)
        function = self._built(site, rank, "reference", generator) if rank else None
        self.put(site, block, function)
        return function

    def _built(self, site: str, rank: int, init: str, generator: torch.Generator) -> Function:
        config, placement = self._configs[site], self._placements[site]
        return build_function(
            config.function,
            placement.width,
            rank,
            copies=placement.copies,
            activation=config.activation,
            init=init,
            generator=generator,
            where=f"interventions.{site}",
        )

    def at(self, site: str, block: int | str) -> Function | None:
        """The edit at a place; None where there is none."""
        blocks = cast("nn.ModuleDict", self[site])
        return cast(Function, blocks[str(block)]) if str(block) in blocks else None

    def put(self, site: str, block: int | str, function: Function | None) -> None:
        """Replace the edit at a place; None: no edit there."""
        blocks = cast("nn.ModuleDict", self[site])
        if function is not None:
            blocks[str(block)] = function
        elif str(block) in blocks:
            del blocks[str(block)]

    def places(self) -> Iterator[tuple[str, str, Function]]:
        """Site, block and function of every edit."""
        for site, blocks in self.items():
            for block, function in cast("nn.ModuleDict", blocks).items():
                yield site, block, cast(Function, function)

    def ranks(self) -> dict[str, dict[str, int]]:
        """Site -> block -> rank."""
        found: dict[str, dict[str, int]] = {site: {} for site in self}
        for site, block, function in self.places():
            found[site][block] = function.rank
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the formulas, named ``<site>.<block>.<tensor>``."""
        return {
            f"{site}.{block}.{name}": tensor
            for site, block, function in self.places()
            for name, tensor in function.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave."""
        for site, block, function in self.places():
            function.load({n: tensors[f"{site}.{block}.{n}"] for n in function.tensors()})
