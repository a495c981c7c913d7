"""One small interface over a CLIP vision tower, whoever wrote the tower.

A tower is read in three stages (embed, blocks, readout) so that a caller can start in the middle,
from states it kept, or go on in another tower. The stages call the tower's own modules, and edits
enter through forward hooks on the modules of named sites.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .activation import FusedQuickGELU

Edit = Callable[[str, int, Tensor], Tensor]


class VisionTower(nn.Module, ABC):
    """A CLIP vision encoder with its projection.

    Shapes: images (batch, 3, image_size, image_size); states (batch, num_tokens, width), the class
    token first; image features (batch, projection_dim), after the projection, not normalised.

    Attributes:
        family: the name under which an artifact remembers whose tower it was.
        gives_features: whether ``forward`` gives image features, and not what comes before the
            projection.
        quick_gelu: the family's class for CLIP's activation function.
        output: the site ``output``: image features go through it.
    """

    family: ClassVar[str]
    gives_features: ClassVar[bool]
    quick_gelu: ClassVar[type[nn.Module]]
    width: int
    num_blocks: int
    num_tokens: int
    projection_dim: int

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Identity()

    # -- the three stages --------------------------------------------------------------------------

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images -> states that enter block 0."""

    @abstractmethod
    def run_block(self, index: int, states: Tensor) -> Tensor:
        """States that enter a block -> states that leave it."""

    @abstractmethod
    def attend(self, index: int, states: Tensor) -> Tensor:
        """The class token's self-attention output in a block, unedited, without hooks.

        (batch, num_tokens, width) -> (batch, 1, width); keys and values are of all tokens.
        """

    @abstractmethod
    def finish(self, index: int, state: Tensor, z: Tensor, edit: Edit) -> Tensor:
        """The class token on its way through a block, from behind the self-attention.

        Args:
            index: of the block.
            state: the class token as it enters the block, (batch, 1, width).
            z: its self-attention output, (batch, 1, width), which ``edit`` may write to.
            edit: ``edit(site, block, z)`` is called for the sites whose modules are not called:
                ``attention`` and ``block``.

        Returns:
            The class token as it leaves the block, (batch, 1, width).
        """

    def run_block_for_class_token(self, index: int, states: Tensor, edit: Edit) -> Tensor:
        """A block for the class token alone: (batch, num_tokens, width) -> (batch, 1, width)."""
        return self.finish(index, states[:, :1], self.attend(index, states), edit)

    @abstractmethod
    def readout(self, states: Tensor) -> Tensor:
        """States that leave the last block (the class token is read) -> image features."""

    def features(self, images: Tensor) -> Tensor:
        """Images -> image features."""
        states = self.embed(images)
        for index in range(self.num_blocks):
            states = self.run_block(index, states)
        return self.readout(states)

    def features_by_class_token(self, images: Tensor) -> Tensor:
        """The same but for rounding, unedited: the last block works on the class token alone."""
        states = self.embed(images)
        for index in range(self.num_blocks - 1):
            states = self.run_block(index, states)
        last = self.num_blocks - 1
        return self.readout(self.run_block_for_class_token(last, states, _unedited))

    # -- what the host toolkit and the artifact need -----------------------------------------------

    @abstractmethod
    def site(self, name: str, block: int) -> nn.Module:
        """The module whose output (or whose output's first entry) is the site's tensor."""

    def site_tensor(self, output: Any) -> Tensor:
        """The (batch, tokens, width) view in a site module's output."""
        return output[0] if isinstance(output, tuple) else output

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What ``from_spec`` needs to build the same tower, as JSON values."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> VisionTower:
        """A tower of that architecture with weights yet to be loaded."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Every tensor by its name in the family's usual checkpoint."""

    @abstractmethod
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over all tensors.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """

    @abstractmethod
    def stock(self) -> nn.Module:
        """The vision model as the host's task pool of this family takes it."""

    @abstractmethod
    def mergeable(self) -> dict[str, nn.Parameter]:
        """The parameters that experts have of their own, in ``named_parameters()`` order."""

    def digest(self) -> str:
        """SHA-256 of all weights: names, shapes, types, bytes."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.weights().items()):
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return sha.hexdigest()

    @contextmanager
    def in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the (frozen) weights in another type for a while; the originals come back."""
        originals = [(parameter, parameter.data) for parameter in self.parameters()]
        try:
            for parameter, data in originals:
                if data.dtype != dtype:
                    parameter.data = data.to(dtype)
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data

    @contextmanager
    def fused_activations(self) -> Iterator[None]:
        """CLIP's activation functions in a form that is cheaper to train through, for a while."""
        found = [
            (module, name, child)
            for module in self.modules()
            for name, child in module.named_children()
            if isinstance(child, self.quick_gelu)
        ]
        try:
            for module, name, _ in found:
                setattr(module, name, FusedQuickGELU())
            yield
        finally:
            for module, name, child in found:
                setattr(module, name, child)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _unedited(site: str, block: int, z: Tensor) -> Tensor:
    return z


def fill(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """``load_state_dict`` that says in one line what does not fit."""
    check_fit(module.state_dict(), weights, what)
    module.load_state_dict(dict(weights))


def check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Compare names and shapes with those that are needed.

    Raises:
        ValueError: the first difference, in one line.
    """
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has misshapen", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{what} {problem} {names[0]}{more}")


def check_expert(task: str, expert: VisionTower, merged: VisionTower) -> None:
    """Make sure that an expert has the merged encoder's architecture.

    Raises:
        ConfigError: the first parameter of another shape, or that one of them lacks.
    """
    own = {name: tuple(p.shape) for name, p in merged.mergeable().items()}
    theirs = {name: tuple(p.shape) for name, p in expert.mergeable().items()}
    if own != theirs:
        name = next(n for n in [*own, *theirs] if own.get(n) != theirs.get(n))
        shape, wanted = (of.get(name, "nothing of that name") for of in (theirs, own))
        raise ConfigError(
            f"modelpool.models.{task}",
            f"{name} has shape {shape}, the merged encoder's {wanted}",
            "experts of one architecture",
        )
