"""Edits in closed form: block by block, the repaired encoder is brought back to the expert.

For one task, from the first block to the last: with z the states of the *repaired* encoder so far
and t the expert's of the same images and tokens, find the edit of z that comes closest to t in
weighted least squares, apply it, go on (``regression.Regression`` has the formula). Each image
passes once through the merged encoder and once through its expert. Nothing is differentiated.

What an edit at a site has to make up for is the difference of the residual streams behind it:

========== ==================== ==================================================
site       it reads x           it should add y
========== ==================== ==================================================
attention  attention output a   (expert's h + a) - (h + a), h being what enters
mlp        MLP output m         expert's block output - block output
block      block output z       expert's block output - z
output     image features f     expert's image features - f
========== ==================== ==================================================

The class token weighs as much as half of the patches together. In the last block it stands alone,
since nothing else is read there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import lightning as L
import torch
from torch import Tensor

from ..calibration import token_weights
from ..data import Datasets, ImageStates, read_images
from ..encoders.base import VisionTower
from ..interventions.functions import function_class
from ..interventions.sites import SITES
from ..model.model import InterventionModel
from .regression import Moments, Regression

Place = tuple[str, int]  # site, block
CLASS_WEIGHT = 0.5  # what the class token counts for, in units of all patch tokens together


@dataclass(kw_only=True)
class EditSolver:
    """Finds one task's edits from rows of what they read and what they should add.

    Args:
        model: the edits at the places are replaced.
        task: whose edits.
        fabric: device and processes; each process has its share of the images.
        ridge: as in ``solve``.
        class_weight: how many patch tokens the class token counts for.
        ranks: of the places; None for as many as gain anything.

    Attributes:
        gains: place -> what each further rank there takes off the mean squared distance of a row.
    """

    model: InterventionModel
    task: str
    fabric: L.Fabric
    ridge: float | None
    class_weight: float
    ranks: Mapping[Place, int] | None
    gains: dict[Place, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tower, self.device = self.model.tower, self.fabric.device

    def place(self, site: str, block: int, moments: Moments) -> None:
        """Put the solved edit into the model."""
        moments = self._over_processes(site, moments)
        regression = Regression(moments, self.ridge)
        form = function_class(self.model.interventions[site].function)
        # copies have one rank, so what it gains is the mean over them
        gains = form.gains(regression).mean(dim=0).tolist()
        worthwhile = next((rank for rank, gain in enumerate(gains) if gain <= 0), len(gains))
        self.gains[site, block] = gains[:worthwhile]
        rank = worthwhile if self.ranks is None else self.ranks[site, block]
        if not moments.weight.any():
            rank = 0  # no token here is read by anything
        function = self.model.edits_of(self.task).set_rank(site, block, rank)
        if function is not None:
            function.to(self.device)
            one = self.model.placements[site].copies is None
            solved = form.solved(regression, rank)
            function.load({name: t.squeeze(0) if one else t for name, t in solved.items()})

    def empty_moments(self, site: str) -> Moments:
        placement = self.model.placements[site]
        return Moments.none(placement.width, placement.copies or 1, self.device)

    def add(self, moments: Moments, site: str, block: int, x: Tensor, y: Tensor) -> None:
        """Add a batch: x is what the edit reads, y what it should add, (images, tokens, _)."""
        placement, alone = self.model.placements[site], x.shape[1] == 1
        tokens = slice(0, 1) if alone or placement.tokens is None else placement.tokens
        part = placement.parts[block]
        weights = torch.ones(1)
        if not alone:
            weights = token_weights(self.tower, block, self.class_weight)[tokens]
        weights = weights.to(x.device).expand(len(x), -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = (z[:, tokens][..., part].to(wide) for z in (x, y))
        if placement.copies is None:
            rows = (x.flatten(0, 1)[None], y.flatten(0, 1)[None], weights.flatten()[None])
        else:
            rows = (x.transpose(0, 1), y.transpose(0, 1), weights.mT)
        moments.merge(Moments.of(*rows))

    def _over_processes(self, site: str, moments: Moments) -> Moments:
        if self.fabric.world_size == 1:
            return moments
        parts = {name: self.fabric.all_gather(t) for name, t in vars(moments).items()}
        total = self.empty_moments(site)
        for rank in range(self.fabric.world_size):
            total.merge(Moments(**{name: part[rank] for name, part in parts.items()}))
        return total


@dataclass(kw_only=True)
class Sweep(EditSolver):
    """One task's images on their way through the repaired encoder and the expert.

    Args:
        expert: the task's.
        places: (site, block), in the order of the forward pass.

    Attributes:
        features: the expert's image features, (images, projection_dim).
    """

    expert: VisionTower
    places: Sequence[Place]
    features: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expert.to(self.device).eval()

    def run(
        self,
        images: Datasets,
        keys: Sequence[tuple[str, int]],
        num_workers: int,
        room: float,
        after_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Solve every place, inside the model's ``for_task``.

        ``room`` are the bytes of memory for the images' states; ``after_block`` is called when all
        images have left a block.
        """
        for place in self.places:
            self.model.edits_of(self.task).set_rank(*place, 0)
        rows = torch.arange(len(keys)).split(self._batch_size)
        mine = rows[self.fabric.global_rank :: self.fabric.world_size]
        batches = [[keys[row] for row in part.tolist()] for part in mine]
        states = ImageStates(room / 2, self.device)  # of the repaired encoder
        targets = ImageStates(room / 2, self.device)  # of the expert
        for pixels in read_images(images, batches, num_workers):
            pixels = pixels.to(self.device, self.tower.dtype)
            states.append(self.tower.embed(pixels))
            targets.append(self.expert.embed(pixels))
        blocks = self.tower.num_blocks
        last_needed = max(blocks - 1 if site == "output" else at for site, at in self.places)
        for block in range(blocks):
            sites = [site for site, at in self.places if at == block and site != "output"]
            for site in sites:
                self._solve(site, block, states, targets, leave=site == sites[-1])
            if not sites:
                if block <= last_needed:
                    self._move_on(self.tower, block, states)
                self._move_on(self.expert, block, targets)
            after_block()
        features = [self.expert.readout(target) for target in targets]
        if ("output", 0) in self.places:
            moments = self.empty_moments("output")
            for state, target in zip(states, features, strict=True):
                x = self.tower.readout(state)  # without an edit there yet
                self.add(moments, "output", 0, x.unsqueeze(1), (target - x).unsqueeze(1))
            self.place("output", 0, moments)
        self.features = self._gathered(features, mine, len(keys))

    # -- a place -----------------------------------------------------------------------------------

    def _solve(
        self, site: str, block: int, states: ImageStates, targets: ImageStates, leave: bool
    ) -> None:
        """Solve a site of a block; with ``leave`` all images leave the block then."""
        moments = self.empty_moments(site)
        for index, (state, target) in enumerate(zip(states, targets, strict=True)):
            out, x = self._through(self.tower, block, state, site)
            wanted, theirs = self._through(self.expert, block, target, site)
            if SITES[site].closed_form == "enters":
                missing = (target[:, : theirs.shape[1]] + theirs) - (state[:, : x.shape[1]] + x)
            else:
                missing = wanted - out
            self.add(moments, site, block, x, missing)
            if leave:
                targets[index] = wanted
                if site == "block":
                    states[index] = out
        self.place(site, block, moments)
        if leave and site == "block":
            states.move(partial(self.tower.tapped, site, block))
        elif leave:
            self._move_on(self.tower, block, states)

    # -- a batch in a block ------------------------------------------------------------------------

    def _through(
        self, tower: VisionTower, block: int, states: Tensor, site: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """What leaves a block, and the tensor of one of its sites."""
        watch = nullcontext(list[Tensor]()) if site is None else tower.watching(site, block)
        with watch as seen:
            if block == tower.num_blocks - 1 and self._class_token_will_do:
                out = tower.finish(block, states[:, :1], tower.attend(block, states))
            else:
                out = tower.run_block(block, states)
        return out, (seen[0] if seen else out)

    def _move_on(self, tower: VisionTower, block: int, states: ImageStates) -> None:
        states.move(lambda state: self._through(tower, block, state)[0])

    # -- what follows from the model ---------------------------------------------------------------

    @property
    def _batch_size(self) -> int:
        # large enough for the matrix products, small enough for a processor's caches
        return max(16, min(256, 2**20 // (self.tower.num_tokens * self.tower.width)))

    @cached_property
    def _class_token_will_do(self) -> bool:
        """Whether the last block may work on the class token alone: nothing there needs others."""
        last, places = self.tower.num_blocks - 1, self.model.placements.items()
        there = {site: p for site, p in places if SITES[site].in_blocks and last in p.blocks}
        return (
            self.tower.can_spare(there)
            and not self.tower.reads_patches
            and all(
                isinstance(p.tokens, slice) and p.tokens.start == 0 and p.copies is None
                for p in there.values()
            )
        )

    # -- processes ---------------------------------------------------------------------------------

    def _gathered(self, features: list[Tensor], rows: Sequence[Tensor], count: int) -> Tensor:
        """All images' features in every process, in order."""
        whole = torch.zeros(count, self.tower.projection_dim, device=self.device)
        for batch, values in zip(rows, features, strict=True):
            whole[batch.to(self.device)] = values.float()
        if self.fabric.world_size > 1:
            whole = self.fabric.all_reduce(whole, reduce_op="sum")  # type: ignore[assignment]
        return whole.cpu()
