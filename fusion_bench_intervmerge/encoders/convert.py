"""The same weights under Hugging Face's names and under OpenCLIP's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .huggingface import HuggingFaceTower
from .openclip import OpenCLIPTower

OPENCLIP_EPS = 1e-5

_OUTSIDE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_openclip(
    tower: HuggingFaceTower, mean: Sequence[float], std: Sequence[float]
) -> OpenCLIPTower:
    """An OpenCLIP tower that computes what the Hugging Face tower computes.

    Args:
        tower: the tower to convert; it is not changed.
        mean, std: what its images are normalised with.

    Raises:
        ValueError: the tower's activation or layer norm has no counterpart in OpenCLIP.
    """
    config = tower.config
    if config.layer_norm_eps != OPENCLIP_EPS:
        raise ValueError(f"layer_norm_eps {config.layer_norm_eps} has no counterpart in OpenCLIP")
    if config.hidden_act not in ("gelu", "quick_gelu"):
        raise ValueError(f"hidden_act {config.hidden_act!r} has no counterpart in OpenCLIP")
    converted = OpenCLIPTower.from_spec(
        {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
            "output_dim": tower.projection_dim,
            "quick_gelu": config.hidden_act == "quick_gelu",
            "mean": mean,
            "std": std,
        }
    )
    converted.load_weights(openclip_weights(tower.weights(), config.num_hidden_layers))
    return converted


def openclip_weights(weights: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Tensors of a ``CLIPVisionModelWithProjection`` under the names of an OpenCLIP checkpoint."""
    renamed = {f"visual.{new}": weights[f"vision_model.{old}"] for old, new in _OUTSIDE.items()}
    renamed["visual.proj"] = weights["visual_projection.weight"].T.contiguous()
    for block in range(num_blocks):
        old_block = f"vision_model.encoder.layers.{block}"
        new_block = f"visual.transformer.resblocks.{block}"
        for kind in ("weight", "bias"):
            for old, new in _IN_BLOCK.items():
                renamed[f"{new_block}.{new}.{kind}"] = weights[f"{old_block}.{old}.{kind}"]
            renamed[f"{new_block}.attn.in_proj_{kind}"] = torch.cat(
                [weights[f"{old_block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
    return renamed
