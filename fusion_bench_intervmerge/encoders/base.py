"""One small interface over a vision tower, whoever wrote the tower.

A tower is read in three stages (embed, blocks, readout) so that a caller can start in the middle,
from saved states, or go on in another tower. The stages call the tower's own modules. To see or
edit the tensor of a site, hook on to the site's *tap*, which the tensor goes through.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import Self

from ..config import ConfigError, Count, Json, Settings, Size, named
from ..interventions.config import InterventionConfig
from ..interventions.placement import Placement
from ..interventions.sites import SITES

Output: TypeAlias = "Tensor | tuple[Tensor, ...]"  # of a module
AfterBlock = Callable[[int, Tensor], None]  # takes a block's index and its output states
ExpertLoaders = Mapping[str, "Callable[[], VisionTower]"]  # task -> what loads its expert

# Of transformers' configs, what says who wrote them: 4.48 to 4.50 would load another attention.
OF_THE_LIBRARY = ("transformers_version", "_attn_implementation_autoset")


class MissingProjectionError(TypeError):
    """A vision model that comes without CLIP's visual projection."""


class Sizes(Settings, extra="ignore"):
    """Sizes in a config of transformers, which itself takes anything."""

    hidden_size: Size
    num_hidden_layers: Count
    num_attention_heads: Size
    num_channels: Size
    image_size: Size
    patch_size: Size


@dataclass(frozen=True)
class ResidualMap:
    """A linear map that writes into the residual stream: ``scale * (weight h + bias)``.

    Attributes:
        reads: the states before the map adds, (batch, num_tokens, width) -> its input h,
            (batch, num_tokens, inputs).
        weight: (width, inputs).
        bias: (width).
        scale: (width), of the layer scale behind the map; None if there is none.
    """

    reads: Callable[[Tensor], Tensor]
    weight: nn.Parameter
    bias: nn.Parameter
    scale: Tensor | None = None

    def add(self, states: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The states behind the map, (batch, num_tokens, width); its inputs, if they are known."""
        inputs = self.reads(states) if inputs is None else inputs
        added = functional.linear(inputs, self.weight, self.bias)
        return states + (added if self.scale is None else self.scale * added)


class VisionTower(nn.Module, ABC):
    """A vision encoder with the projection behind it, if it has one.

    Shapes: images (batch, 3, image_size, image_size); states (batch, num_tokens, width), the class
    token first; image features (batch, projection_dim), not normalised.

    Attributes:
        family: the name by which an artifact remembers whose tower it was.
        title, hub_task: what a model card calls it, and what a hub says it is for.
        gives_features: whether ``forward`` gives image features, and not what comes before the
            projection.
        sites: site -> path of its module, if it is not one of those that the site itself names.
        shortcuts: sites whose taps ``attend`` and ``finish`` pass through; none if the tower does
            not have the two. If another site is edited, whole blocks are run.
        prefix_tokens: how many tokens come before the patches.
        reads_patches: whether the readout reads the patch tokens as well as the class token.
        output: the site ``output``: image features go through it.
        model: the family's own module, as its library makes it.
    """

    family: ClassVar[str]
    title: ClassVar[str] = "CLIP"
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    gives_features: ClassVar[bool] = False
    sites: ClassVar[Mapping[str, str]] = {}
    shortcuts: ClassVar[frozenset[str]] = frozenset()
    prefix_tokens: int = 1
    reads_patches: bool = False
    image_size: int
    width: int
    num_blocks: int
    num_tokens: int
    projection_dim: int
    model: Any

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Identity()
        self._taps = nn.ModuleDict()

    @classmethod
    @abstractmethod
    def wrap(cls, model: nn.Module, projection: nn.Linear | None = None) -> Self | None:
        """A model of this family as a tower; None if it is not of this family.

        Raises:
            MissingProjectionError: the family's models need ``projection`` beside them.
        """

    def forward(self, pixel_values: Tensor, **kwargs: object) -> object:
        """The model's own output: before the projection, as FusionBench's CLIP pools expect it."""
        return self.model(pixel_values, **kwargs)

    # -- the three stages --------------------------------------------------------------------------

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images -> states that enter block 0."""

    @abstractmethod
    def block(self, index: int) -> nn.Module:
        """A block, whose output, or whose output's first entry, are the states that leave it."""

    def run_block(self, index: int, states: Tensor) -> Tensor:
        """States that enter a block -> states that leave it."""
        return first(self.block(index)(states))

    @abstractmethod
    def residual_maps(self, index: int) -> tuple[ResidualMap, ResidualMap]:
        """The attention's output projection and the MLP's last layer: one after the other they add
        all that a block adds to the states.
        """

    @abstractmethod
    def readout(self, states: Tensor) -> Tensor:
        """States that leave the last block -> image features."""

    def features(self, images: Tensor) -> Tensor:
        """Images -> image features."""
        return self.features_from(self.embed(images))

    def features_from(
        self,
        states: Tensor,
        start: int = 0,
        after_block: AfterBlock | None = None,
        class_token_alone: bool = False,
    ) -> Tensor:
        """States that enter block ``start`` -> image features.

        Args:
            states: (batch, num_tokens, width).
            start: the first block to run; ``num_blocks`` for none.
            after_block: called with each block's index and output states.
            class_token_alone: whether the last block may leave the other tokens out if nothing
                behind it reads them. The same but for rounding.
        """
        for block in range(start, self.num_blocks):
            last = block == self.num_blocks - 1
            if last and class_token_alone and self.shortcuts and not self.reads_patches:
                states = self.finish(block, states[:, :1], self.attend(block, states))
            else:
                states = self.run_block(block, states)
            if after_block is not None:
                after_block(block, states)
        return self.readout(states)

    # -- shortcuts, for towers that name them in ``shortcuts`` -------------------------------------

    def attend(self, index: int, states: Tensor) -> Tensor:
        """The class token's self-attention output in a block, before its tap.

        (batch, num_tokens, width) -> (batch, 1, width); keys and values are of all tokens.
        """
        raise TypeError(f"{type(self).__name__} has no shortcuts; run_block goes through a block")

    def finish(self, index: int, state: Tensor, z: Tensor) -> Tensor:
        """The class token as it leaves a block, (batch, 1, width).

        Args:
            index: of the block.
            state: the class token as it enters the block, (batch, 1, width).
            z: its self-attention output, (batch, 1, width), which goes through its tap here.
        """
        raise TypeError(f"{type(self).__name__} has no shortcuts; run_block goes through a block")

    def can_spare(self, edited: Iterable[str]) -> bool:
        """Whether ``attend`` and ``finish`` can replace a block that is edited at these sites."""
        return bool(self.shortcuts) and self.shortcuts.issuperset(edited)

    # -- sites -------------------------------------------------------------------------------------

    def module(self, site: str, block: int) -> nn.Module:
        """The module whose output (or whose output's first entry) is the site's tensor.

        Raises:
            ConfigError: towers of this family have no such site.
        """
        inside = SITES[site].in_blocks
        paths = [self.sites[site]] if site in self.sites else SITES[site].modules
        for path in paths:
            try:
                return (self.block(block) if inside else self).get_submodule(path)
            except AttributeError:
                continue
        raise ConfigError(f"interventions.{site}", f"{self.family} encoders have no such site")

    def placements(self, interventions: Mapping[str, InterventionConfig]) -> dict[str, Placement]:
        """Site -> where its edits act in this encoder; a ConfigError of what does not fit."""
        fitted = {}
        for name, config in interventions.items():
            site = SITES[name]
            with named(f"interventions.{name}"):
                fitted[name] = Placement.fit(
                    config,
                    width=self.width if site.has_tokens else self.projection_dim,
                    num_blocks=self.num_blocks,
                    num_tokens=self.num_tokens,
                    prefix_tokens=self.prefix_tokens,
                    site=site,
                )
            self.module(name, fitted[name].blocks[0])
        return fitted

    def tap(self, site: str, block: int = 0) -> nn.Module:
        """What a site's tensor goes through: a forward hook on it sees the tensor, and may return
        another in its place.

        Raises:
            ConfigError: towers of this family have no such site.
        """
        name = f"{site} {block}"
        if name not in self._taps:
            module, self._taps[name] = self.module(site, block), nn.Identity()
            module.register_forward_hook(partial(through, self._taps[name]))
        return self._taps[name]

    def tapped(self, site: str, block: int, z: Tensor) -> Tensor:
        """A site's tensor behind its tap, for shortcuts that do not call the site's module."""
        name = f"{site} {block}"
        return self._taps[name](z) if name in self._taps else z

    @contextmanager
    def watching(self, site: str, block: int) -> Iterator[list[Tensor]]:
        """A site's tensors, edited, of the forward passes inside."""
        seen: list[Tensor] = []
        hook = self.tap(site, block).register_forward_hook(lambda _, __, z: seen.append(z))
        try:
            yield seen
        finally:
            hook.remove()

    # -- what the host toolkit and the artifact need -----------------------------------------------

    @abstractmethod
    def spec(self) -> Json:
        """What ``from_spec`` needs to build the same tower, as JSON values."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Mapping[str, object]) -> Self:
        """A tower of that architecture with weights yet to be loaded."""

    def weights(self) -> dict[str, Tensor]:
        """Every tensor, not a copy of it, by its name in the family's usual checkpoint."""
        return dict(self.model.state_dict())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over all tensors.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """
        own = self.weights()
        check_fit(own, weights, "the vision model's weights file")
        for name, tensor in own.items():
            tensor.copy_(weights[name])

    def library_config(self) -> Json | None:
        """The config that stands beside the weights in the library's checkpoints, if any."""
        return None

    def library_model(self) -> nn.Module:
        """The vision model of the family's own library, as task pools take it."""
        return self.model

    def mergeable(self) -> dict[str, nn.Parameter]:
        """The parameters that experts have of their own, in ``named_parameters()`` order."""
        return dict(self.library_model().named_parameters())

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
                parameter.data = data.to(dtype)
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data

    def cheap_to_train(self) -> AbstractContextManager[None]:
        """Short attention is cheaper to train through inside.

        On a CPU, PyTorch's flash attention takes no advantage of several threads for very few
        tokens, where plain products are more than twice as fast; from some 50 tokens on it is the
        faster one.
        """
        few = self.device.type == "cpu" and self.num_tokens <= 32
        return sdpa_kernel(SDPBackend.MATH) if few else nullcontext()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def first(output: Output) -> Tensor:
    """A module's output tensor, alone or before other outputs."""
    return output[0] if isinstance(output, tuple) else output


def through(tap: nn.Module, module: nn.Module, args: object, output: Output) -> Output | None:
    """A forward hook: a module's output tensor goes through a tap."""
    z = first(output)
    edited = tap(z)
    if edited is z:
        return None
    return (edited, *output[1:]) if isinstance(output, tuple) else edited


def check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """A ValueError, one line, of the first difference from the names and shapes in ``own``."""
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has misshapen", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{what} {problem} {names[0]}{more}")


def check_expert(task: str, expert: VisionTower, merged: VisionTower) -> None:
    """A ConfigError unless an expert has the merged encoder's parameters, and they are finite."""
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
    check_finite(expert.mergeable(), f"modelpool.models.{task}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """A ConfigError of the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            problem = f"{name} has numbers that are not finite"
            raise ConfigError(where, problem, "finite weights")
