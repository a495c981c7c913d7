"""Hugging Face's CLIP vision model, in the layouts of transformers 4 (nested) and 5 (flat)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import QuickGELUActivation

from ..schema import Count, Size, Strict, checked
from .base import Edit, VisionTower, fill


class _VisionConfig(Strict):
    """What a vision model is built from; ``CLIPVisionConfig`` itself takes anything."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Size
    num_channels: Size
    image_size: Size
    patch_size: Size
    hidden_act: str
    layer_norm_eps: PositiveFloat


class _Spec(Strict):
    family: Literal["huggingface"]
    vision_config: dict[str, Any]
    projection_dim: Size


class HuggingFaceTower(VisionTower):
    """A ``CLIPVisionModel`` and the visual projection that CLIP puts behind it.

    Args:
        model: the vision model; transformers' ``CLIPVisionModel`` or, in version 4, its inner
            ``CLIPVisionTransformer``.
        projection: CLIP's ``visual_projection``, which the experts share.
    """

    family = "huggingface"
    gives_features = False
    quick_gelu = QuickGELUActivation

    def __init__(self, model: nn.Module, projection: nn.Linear):
        super().__init__()
        self.model: Any = model
        self.projection = projection
        config = self.config
        self.width = config.hidden_size
        self.num_blocks = config.num_hidden_layers
        self.num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.projection_dim = projection.out_features

    @property
    def config(self) -> CLIPVisionConfig:
        return self.model.config

    @property
    def _root(self) -> Any:
        return getattr(self.model, "vision_model", self.model)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """The vision model's own output, before the projection, as FusionBench expects it."""
        return self.model(pixel_values, **kwargs)

    def embed(self, images: Tensor) -> Tensor:
        return self._root.pre_layrnorm(self._root.embeddings(images))

    def run_block(self, index: int, states: Tensor) -> Tensor:
        # The masks are positional and without default in some releases of version 4.
        layer = self._root.encoder.layers[index]
        return self.site_tensor(
            layer(states, None, None) if _takes_two_masks(layer) else layer(states, None)
        )

    def attend(self, index: int, states: Tensor) -> Tensor:
        layer = self._root.encoder.layers[index]
        attention = layer.self_attn

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        x = layer.layer_norm1(states)
        z = F.scaled_dot_product_attention(
            heads(attention.q_proj(x[:, :1])),
            heads(attention.k_proj(x)),
            heads(attention.v_proj(x)),
            scale=attention.scale,
        )
        return attention.out_proj(z.transpose(1, 2).flatten(2))

    def finish(self, index: int, state: Tensor, z: Tensor, edit: Edit) -> Tensor:
        layer = self._root.encoder.layers[index]
        state = state + edit("attention", index, z)
        return edit("block", index, state + layer.mlp(layer.layer_norm2(state)))

    def readout(self, states: Tensor) -> Tensor:
        return self.output(self.projection(self._root.post_layernorm(states[:, 0])))

    def site(self, name: str, block: int) -> nn.Module:
        if name == "output":
            return self.output
        layer = self._root.encoder.layers[block]
        return {"attention": layer.self_attn, "mlp": layer.mlp, "block": layer}[name]

    def spec(self) -> dict[str, Any]:
        config = self.config.to_diff_dict()
        return {
            "family": self.family,
            "vision_config": {k: v for k, v in config.items() if k != "transformers_version"},
            "projection_dim": self.projection_dim,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> HuggingFaceTower:
        read = checked(_Spec, dict(spec), "tower")
        config = CLIPVisionConfig(**read.vision_config)
        sizes = {name: getattr(config, name, None) for name in _VisionConfig.model_fields}
        checked(_VisionConfig, sizes, "tower.vision_config")
        projection = nn.Linear(config.hidden_size, read.projection_dim, bias=False)
        return cls(CLIPVisionModel(config).eval(), projection)

    def weights(self) -> dict[str, Tensor]:
        """Tensors by their names in a ``CLIPVisionModelWithProjection`` checkpoint."""
        tensors = {f"vision_model.{n}": t for n, t in self._root.state_dict().items()}
        return {**tensors, "visual_projection.weight": self.projection.weight.detach()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        vision = {
            n.removeprefix("vision_model."): t
            for n, t in weights.items()
            # a constant that older releases kept among the weights
            if n.startswith("vision_model.") and not n.endswith("position_ids")
        }
        behind = "visual_projection."
        projection = {n.removeprefix(behind): t for n, t in weights.items() if n.startswith(behind)}
        fill(self._root, vision, "the vision model's weights file")
        fill(self.projection, projection, "the projection")

    def stock(self) -> nn.Module:
        return self.model

    def mergeable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


def _takes_two_masks(layer: nn.Module) -> bool:
    names = layer.forward.__code__.co_varnames[: layer.forward.__code__.co_argcount]
    return "causal_attention_mask" in names
