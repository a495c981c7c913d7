"""The input of every analysis: one task, its images, its expert, and the models beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import ConfigError
from ..encoders.base import VisionTower
from ..model.model import InterventionModel

EXPERT, MERGED = "expert", "merged"  # encoders beside the repaired models
BATCH = 32


@dataclass(frozen=True)
class Trace:
    """An encoder's outputs on the images.

    Attributes:
        blocks: the class token at each block's output, (blocks, images, width).
        features: image features, (images, projection_dim).
    """

    blocks: Tensor
    features: Tensor


@dataclass
class TaskEncoders:
    """One task, seen by its expert, by the merged encoder and by repaired models.

    Attributes:
        task: its name.
        images: (images, 3, image_size, image_size); the same ones for every encoder.
        expert: the task's expert.
        merged: the merged encoder.
        models: name -> repaired model with edits for the task.
        logits: zero-shot logits (images, classes) of image features, if there are class names.
        labels: (images,), if there are any.

    Raises:
        ConfigError: the encoders are of different sizes, or a model has the name of another.
    """

    task: str
    images: Tensor
    expert: VisionTower
    merged: VisionTower
    models: Mapping[str, InterventionModel]
    logits: Callable[[Tensor], Tensor] | None = None
    labels: Tensor | None = None
    _traces: dict[str, Trace] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in (EXPERT, MERGED):
            if name in self.models:
                raise ConfigError("methods", f"no repair can be called {name!r}", "another name")
        if _sizes(self.expert) != _sizes(self.merged):
            raise ConfigError(
                f"modelpool.models.{self.task}",
                f"it has {_sizes(self.expert)}, the merged encoder {_sizes(self.merged)}",
                "experts of the merged encoder's architecture",
            )

    @property
    def compared(self) -> list[str]:
        """The encoders that are compared with the expert."""
        return [MERGED, *self.models]

    @contextmanager
    def encoder(self, name: str) -> Iterator[VisionTower]:
        """An encoder by name; its tower has the task's edits in every pass inside."""
        if name in (EXPERT, MERGED):
            yield self.expert if name == EXPERT else self.merged
        else:
            with self.models[name].for_task(self.task):
                yield self.models[name].tower

    def trace(self, name: str) -> Trace:
        """An encoder's outputs, computed once."""
        if name not in self._traces:
            with self.encoder(name) as tower:
                parts = [_trace(tower, images) for images in self.batches(tower)]
            self._traces[name] = Trace(
                torch.cat([part.blocks for part in parts], dim=1),
                torch.cat([part.features for part in parts]),
            )
        return self._traces[name]

    def batches(self, tower: VisionTower) -> Iterator[Tensor]:
        """The images on the tower's device, in its type."""
        for images in self.images.split(BATCH):
            yield images.to(tower.device, tower.dtype)

    def scores(self, features: Tensor) -> dict[str, float]:
        """How often image features (images, projection_dim) predict the right class.

        Returns:
            ``agreement``, the share of images whose predicted class is the expert's, and
            ``accuracy``; without logits neither, without labels no accuracy.
        """
        if self.logits is None:
            return {}
        predicted = self.logits(features).argmax(dim=-1).cpu()
        expert = self.logits(self.trace(EXPERT).features).argmax(dim=-1).cpu()
        shares = {"agreement": float((predicted == expert).double().mean())}
        if self.labels is not None:
            shares["accuracy"] = float((predicted == self.labels).double().mean())
        return shares


@torch.no_grad()
def walk(tower: VisionTower, images: Tensor) -> Iterator[Tensor]:
    """States (batch, num_tokens, width) after each number of blocks, 0 to num_blocks."""
    states = tower.embed(images)
    yield states
    for block in range(tower.num_blocks):
        states = tower.run_block(block, states)
        yield states


@torch.no_grad()
def finish(tower: VisionTower, states: Tensor, start: int) -> Tensor:
    """Image features of the states that enter block ``start``, on the CPU.

    Every block works on all tokens, as in ``walk``: the rounding of a shortcut would show as a
    false difference.
    """
    for block in range(start, tower.num_blocks):
        states = tower.run_block(block, states)
    return _on_cpu(tower.readout(states))


def _trace(tower: VisionTower, images: Tensor) -> Trace:
    tokens = []
    for states in walk(tower, images):
        tokens.append(_on_cpu(states[:, 0]))
    return Trace(torch.stack(tokens[1:]), finish(tower, states, tower.num_blocks))


def _on_cpu(tensor: Tensor) -> Tensor:
    # half types are for the encoder; means over thousands of entries are not
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _sizes(tower: VisionTower) -> str:
    return (
        f"{tower.num_blocks} blocks of width {tower.width}, {tower.num_tokens} tokens and "
        f"{tower.projection_dim} features"
    )
