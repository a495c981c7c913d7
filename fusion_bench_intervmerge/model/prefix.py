"""As much of a forward pass as no edit reaches: the same for every task, and at every step.

Each kind keeps one tensor of a batch of images, which is computed once an image, and knows how to
go on from it to image features inside ``for_task``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..encoders.base import AfterBlock
from ..interventions.sites import SITES

if TYPE_CHECKING:
    from .model import InterventionModel


@dataclass(frozen=True)
class Prefix(ABC):
    """A way to split the forward pass of a model."""

    model: InterventionModel

    @abstractmethod
    def of(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) -> what is kept of them, (batch, ...)."""

    @abstractmethod
    def features(self, kept: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        """Image features (batch, projection_dim) from what was kept.

        Args:
            kept: (batch, ...), as ``of`` gave it, or its rows.
            after_block: as ``VisionTower.features_from`` takes it.
        """

    def embedded(self, images: Tensor) -> Tensor:
        """The states that enter block 0, in the tower's own place and type."""
        tower = self.model.tower
        return tower.embed(images.to(tower.device, tower.dtype))

    def go_on(self, states: Tensor, start: int, after_block: AfterBlock | None = None) -> Tensor:
        """Image features from the states that enter block ``start``."""
        tower = self.model.tower
        alone = after_block is None and class_token_alone(self.model, tower.num_blocks - 1)
        return tower.features_from(states, start, after_block, alone)


class Images(Prefix):
    """Nothing is the same: weights move, or the embedding is edited. Kept: the images."""

    def of(self, images: Tensor) -> Tensor:
        return images

    def features(self, kept: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        return self.go_on(self.embedded(kept), 0, after_block)

    def unedited(self, kept: Tensor) -> Tensor:
        """The states that enter block 0 without any edit, (batch, num_tokens, width)."""
        with self.model.for_task(None), torch.no_grad():
            return self.embedded(kept)


@dataclass(frozen=True)
class States(Prefix):
    """Kept: the states that enter a block, (batch, num_tokens, width)."""

    first: int

    def of(self, images: Tensor) -> Tensor:
        with self.model.for_task(None), torch.no_grad():
            states = self.embedded(images)
            for block in range(self.first):
                states = self.model.tower.run_block(block, states)
            return states

    def features(self, kept: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        return self.go_on(kept, self.first, after_block)


@dataclass(frozen=True)
class PastAttention(States):
    """Where the first edited block's edits leave all tokens but the class token alone.

    Kept, side by side: the class token that enters the block, its self-attention output there, and
    the other tokens that leave the block, (batch, 1 + num_tokens, width); nothing reads those of
    the last block, where the first two are all.
    """

    def of(self, images: Tensor) -> Tensor:
        tower, states = self.model.tower, super().of(images)
        with self.model.for_task(None), torch.no_grad():
            if self.first == tower.num_blocks - 1 and not tower.reads_patches:
                return torch.cat([states[:, :1], tower.attend(self.first, states)], dim=1)
            # Caught on its way: ``attend`` would compute all keys and values a second time.
            with tower.watching("attention", self.first) as seen:
                others = tower.run_block(self.first, states)[:, 1:]
            return torch.cat([states[:, :1], seen[0][:, :1], others], dim=1)

    def features(self, kept: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        state, z, others = kept.split([1, 1, kept.shape[1] - 2], dim=1)
        state = self.model.tower.finish(self.first, state, z)
        return self.go_on(torch.cat([state, others], dim=1), self.first + 1, after_block)


class Features(Prefix):
    """Where only the output is edited. Kept: the image features, (batch, projection_dim)."""

    def of(self, images: Tensor) -> Tensor:
        with self.model.for_task(None), torch.no_grad():
            states = self.embedded(images)
            return self.model.tower.features_from(states, class_token_alone=True)

    def features(self, kept: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        return self.model.tower.output(kept)


def prefix_of(model: InterventionModel, *, moving: bool = False, blocks: bool = False) -> Prefix:
    """As much of a model's forward pass as is the same at every step of a training.

    Args:
        model: the model.
        moving: whether its weights move too.
        blocks: whether the loss reads every block's output.
    """
    sites = {name: SITES[name] for name in model.placements}
    if moving or any(site.at == "start" for site in sites.values()):
        return Images(model)
    if blocks:
        return States(model, 0)
    if set(sites) == {"output"}:
        return Features(model)
    inside = [model.placements[name].blocks[0] for name, site in sites.items() if site.in_blocks]
    first = min(inside, default=model.tower.num_blocks)
    return (PastAttention if class_token_alone(model, first) else States)(model, first)


def class_token_alone(model: InterventionModel, block: int) -> bool:
    """Whether a block's edits, and the tower, let the class token go through it alone."""
    of = {n: p for n, p in model.placements.items() if SITES[n].in_blocks and block in p.blocks}
    return model.tower.can_spare(of) and all(place.class_token_only for place in of.values())
