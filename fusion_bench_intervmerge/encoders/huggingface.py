"""Hugging Face's CLIP vision model, in the layouts of transformers 4 (nested) and 5 (flat)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Json, Settings, Size
from .base import OF_THE_LIBRARY, MissingProjectionError, ResidualMap, Sizes, VisionTower, first

# What transformers' CLIP models call themselves.
_CLIP = ("clip", "clip_vision_model")
# What version 4 nests in a ``CLIPVisionModel``; version 5 has none.
_INNER = "CLIPVisionTransformer"


class _Sizes(Sizes):
    intermediate_size: Size
    hidden_act: str
    layer_norm_eps: PositiveFloat


class _Spec(Settings):
    family: Literal["huggingface"]
    vision_config: Json
    projection_dim: Size


class HuggingFaceTower(VisionTower):
    """A ``CLIPVisionModel`` and the visual projection that CLIP puts behind it.

    Args:
        model: the vision model; transformers' ``CLIPVisionModel`` or, in version 4, its inner
            ``CLIPVisionTransformer``.
        projection: CLIP's ``visual_projection``, which the experts share.
    """

    family = "huggingface"
    shortcuts = frozenset({"attention", "mlp", "block"})

    def __init__(self, model: nn.Module, projection: nn.Linear):
        super().__init__()
        self.model = model
        self.projection = projection
        config = self.config
        self.width = config.hidden_size
        self.num_blocks = config.num_hidden_layers
        self.image_size = config.image_size
        self.num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.projection_dim = projection.out_features

    @classmethod
    def wrap(cls, model: nn.Module, projection: nn.Linear | None = None) -> HuggingFaceTower | None:
        if getattr(getattr(model, "config", None), "model_type", None) not in _CLIP:
            return None
        if not hasattr(model, "visual_projection"):
            if projection is None:
                raise MissingProjectionError(
                    f"{type(model).__name__} needs CLIP's visual projection beside it"
                )
            return cls(as_vision_model(model), copy.deepcopy(projection))
        whole: Any = model
        inner = whole.vision_model
        if type(inner).__name__ == _INNER:
            inner = as_vision_model(copy.deepcopy(inner)).eval()
        return cls(inner, copy.deepcopy(whole.visual_projection))

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def _root(self) -> Any:
        return getattr(self.model, "vision_model", self.model)

    def embed(self, images: Tensor) -> Tensor:
        return self._root.pre_layrnorm(self._root.embeddings(images))

    def block(self, index: int) -> Any:
        return self._root.encoder.layers[index]

    def run_block(self, index: int, states: Tensor) -> Tensor:
        # The masks are positional and without default in some releases of version 4.
        layer = self.block(index)
        return first(layer(states, None, None) if _takes_two_masks(layer) else layer(states, None))

    def _mixed(self, index: int, states: Tensor, queries: int | None = None) -> Tensor:
        """What the self-attention's output projection reads, of the first ``queries`` tokens."""
        layer = self.block(index)
        attention = layer.self_attn

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        x = layer.layer_norm1(states)
        mixed = F.scaled_dot_product_attention(
            heads(attention.q_proj(x[:, :queries])),
            heads(attention.k_proj(x)),
            heads(attention.v_proj(x)),
            scale=attention.scale,
        )
        return mixed.transpose(1, 2).flatten(2)

    def attend(self, index: int, states: Tensor) -> Tensor:
        return self.block(index).self_attn.out_proj(self._mixed(index, states, 1))

    def residual_maps(self, index: int) -> tuple[ResidualMap, ResidualMap]:
        layer = self.block(index)
        out, mlp = layer.self_attn.out_proj, layer.mlp
        return (
            ResidualMap(lambda states: self._mixed(index, states), out.weight, out.bias),
            ResidualMap(
                lambda states: mlp.activation_fn(mlp.fc1(layer.layer_norm2(states))),
                mlp.fc2.weight,
                mlp.fc2.bias,
            ),
        )

    def finish(self, index: int, state: Tensor, z: Tensor) -> Tensor:
        layer = self.block(index)
        state = state + self.tapped("attention", index, z)
        return self.tapped("block", index, state + layer.mlp(layer.layer_norm2(state)))

    def readout(self, states: Tensor) -> Tensor:
        return self.output(self.projection(self._root.post_layernorm(states[:, 0])))

    def spec(self) -> Json:
        config = self.config.to_diff_dict()
        return {
            "family": self.family,
            "vision_config": {k: v for k, v in config.items() if k not in OF_THE_LIBRARY},
            "projection_dim": self.projection_dim,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, object]) -> HuggingFaceTower:
        with torch.device("cpu"):  # the import fails on the meta device
            from transformers import CLIPVisionConfig, CLIPVisionModel

        read = _Spec.read(spec, "tower")
        config = CLIPVisionConfig(**read.vision_config)
        _Sizes.read(config.to_dict(), "tower.vision_config")
        projection = nn.Linear(config.hidden_size, read.projection_dim, bias=False)
        return cls(CLIPVisionModel(config).eval(), projection)

    def library_config(self) -> Json:
        """What ``CLIPVisionModelWithProjection.from_pretrained`` reads beside the weights."""
        return {
            **self.spec()["vision_config"],
            "projection_dim": self.projection_dim,
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
        }

    def weights(self) -> dict[str, Tensor]:
        """Tensors by their names in a ``CLIPVisionModelWithProjection`` checkpoint."""
        tensors = {f"vision_model.{n}": t for n, t in self._root.state_dict().items()}
        return {**tensors, "visual_projection.weight": self.projection.weight.detach()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        parts = ("vision_model.", "visual_projection.")
        own = {name: tensor for name, tensor in weights.items() if name.startswith(parts)}
        # position_ids: a constant that older releases kept among the weights
        super().load_weights({n: t for n, t in own.items() if not n.endswith("position_ids")})


def as_vision_model(model: nn.Module) -> nn.Module:
    """A ``CLIPVisionModel``: the model itself, or around the ``CLIPVisionTransformer`` it is."""
    if type(model).__name__ != _INNER:
        return model
    inner: Any = model
    with torch.device("cpu"):  # the import fails on the meta device
        from transformers import CLIPVisionModel
    with torch.device("meta"):
        outer = CLIPVisionModel(inner.config)
    outer.vision_model = inner
    return outer.train(inner.training)


def _takes_two_masks(layer: nn.Module) -> bool:
    names = layer.forward.__code__.co_varnames[: layer.forward.__code__.co_argcount]
    return "causal_attention_mask" in names
