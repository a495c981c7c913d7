"""The part of a forward pass that no edit reaches: the same for every task, and at every step.

A prefix keeps one tensor per batch of images, which is computed once per image, and knows how to go
on from it to image features. ``of`` is called where no task's edits apply, ``features`` where those
of the images' tasks do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoders.base import AfterBlock, VisionTower
from ..interventions.placement import Placement
from ..interventions.sites import SITES

Placements = Mapping[str, Placement]  # by site


@dataclass(frozen=True)
class Prefix(ABC):
    """A way to split the forward pass of a tower that is edited at some places."""

    tower: VisionTower
    placements: Placements

    @abstractmethod
    def of(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) -> what is kept of them, (batch, ...)."""

    @abstractmethod
    def features(self, prefix: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        """Image features (batch, projection_dim) from what ``of`` gave, or from rows of it."""

    @torch.no_grad()
    def read(self, images: Tensor, prefix: Tensor) -> list[Tensor]:
        """What a router reads of images: their embedding, whose colours and textures later blocks
        forget, and what ``of`` gave; tokens (batch, any, width), or image features.
        """
        return [self._embed(images), prefix]

    def _embed(self, images: Tensor) -> Tensor:
        return self.tower.embed(images.to(self.tower.device, self.tower.dtype))

    def _features_from(
        self, states: Tensor, start: int, after_block: AfterBlock | None = None
    ) -> Tensor:
        """Image features from the states that enter block ``start``."""
        last = self.tower.num_blocks - 1
        alone = after_block is None and class_token_alone(self.tower, self.placements, last)
        return self.tower.features_from(states, start, after_block, alone)


class Images(Prefix):
    """Nothing is the same, because weights move or the embedding is edited. Kept: the images."""

    def of(self, images: Tensor) -> Tensor:
        return images

    def features(self, prefix: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        return self._features_from(self._embed(prefix), 0, after_block)

    @torch.no_grad()
    def read(self, images: Tensor, prefix: Tensor) -> list[Tensor]:
        return [self._embed(images)]


@dataclass(frozen=True)
class States(Prefix):
    """Kept: the states that enter block ``first``, (batch, num_tokens, width)."""

    first: int

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        states = self._embed(images)
        for block in range(self.first):
            states = self.tower.run_block(block, states)
        return states

    def read(self, images: Tensor, prefix: Tensor) -> list[Tensor]:
        return super().read(images, prefix) if self.first else [prefix]

    def features(self, prefix: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        return self._features_from(prefix, self.first, after_block)


class PastAttention(States):
    """If the first edited block's edits leave all tokens but the class token alone.

    Kept, side by side: the class token that enters the block, its self-attention output there, and
    the other tokens that leave the block, (batch, 1 + num_tokens, width). Nothing reads the other
    tokens of the last block, so there the first two are all.
    """

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        tower, states = self.tower, super().of(images)
        if self.first == tower.num_blocks - 1 and not tower.reads_patches:
            return torch.cat([states[:, :1], tower.attend(self.first, states)], dim=1)
        # Caught on its way: ``attend`` would compute all keys and values a second time.
        with tower.watching("attention", self.first) as seen:
            others = tower.run_block(self.first, states)[:, 1:]
        return torch.cat([states[:, :1], seen[0][:, :1], others], dim=1)

    def features(self, prefix: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        state, z, others = prefix.split([1, 1, prefix.shape[1] - 2], dim=1)
        state = self.tower.finish(self.first, state, z)
        states = torch.cat([state, others], dim=1)
        return self._features_from(states, self.first + 1, after_block)


class Features(Prefix):
    """If only the output is edited. Kept: the image features, (batch, projection_dim)."""

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        return self.tower.features_from(self._embed(images), class_token_alone=True)

    def features(self, prefix: Tensor, after_block: AfterBlock | None = None) -> Tensor:
        return self.tower.output(prefix)


def prefix_of(
    tower: VisionTower, placements: Placements, *, moving: bool = False, blocks: bool = False
) -> Prefix:
    """The longest prefix that is the same at every step of a training.

    Args:
        tower: the merged encoder.
        placements: where it is edited, by site.
        moving: whether its weights move too.
        blocks: whether the loss reads every block's output.
    """
    sites = {name: SITES[name] for name in placements}
    if moving or any(site.at == "start" for site in sites.values()):
        return Images(tower, placements)
    if blocks:
        return States(tower, placements, 0)
    if set(sites) == {"output"}:
        return Features(tower, placements)
    inside = [placements[name].blocks[0] for name, site in sites.items() if site.in_blocks]
    first = min(inside, default=tower.num_blocks)
    kind = PastAttention if class_token_alone(tower, placements, first) else States
    return kind(tower, placements, first)


def class_token_alone(tower: VisionTower, placements: Placements, block: int) -> bool:
    """Whether a block's edits, and the tower, let the class token go through it alone."""
    here = {n: p for n, p in placements.items() if SITES[n].in_blocks and block in p.blocks}
    return tower.can_spare(here) and all(place.class_token_only for place in here.values())
