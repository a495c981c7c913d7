"""Encoders of the task-vectors paper, built without a download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isqrt

import open_clip
from torch import Tensor, nn

from ...config import ConfigError, Json
from ...encoders.openclip import MEAN, STD, OpenCLIPTower

# OpenAI's vision transformers, which the paper fine-tuned, all have heads of this width.
HEAD_WIDTH = 64


class ImageEncoder(nn.Module):
    """An OpenCLIP vision transformer under the names of the task-vectors paper's ``ImageEncoder``.

    Every tensor is called ``model.visual.*``. The paper's encoders also carry leftovers of the text
    tower (token embeddings and the like), which no image passes through and no fine-tuning changed.
    They are left out, so that merging methods see what an expert has of its own: methods that
    count parameters (Ties' trimming) or list them (AdaMerging's coefficients) count and list the
    vision tower alone.

    Args:
        tower: whose transformer to take over.

    Attributes:
        train_preprocess, val_preprocess: PIL image -> (3, image_size, image_size).
    """

    def __init__(self, tower: OpenCLIPTower):
        super().__init__()
        self.model = nn.Module()
        self.model.visual = tower.visual
        self.train_preprocess = tower.train_preprocess
        self.val_preprocess = tower.val_preprocess

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) -> image features (batch, projection_dim)."""
        return self.model.visual(images)  # type: ignore[operator]


def named_spec(model_name: str, where: str) -> Json:
    """The sizes of one of OpenCLIP's plain vision transformers, with OpenAI's activation.

    Args:
        model_name: such as ``ViT-B-32``.
        where: the config key that said so.

    Returns:
        what ``OpenCLIPTower.from_spec`` takes.

    Raises:
        ConfigError: OpenCLIP knows no such architecture, or it is not a plain transformer.
    """
    config = open_clip.get_model_config(model_name) or {}
    vision = config.get("vision_cfg", {})
    plain = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    if not plain.issuperset(vision) or not isinstance(vision.get("layers"), int):
        names = "ViT-B-32, ViT-B-16, ViT-L-14, or OpenCLIP's name of another plain ViT"
        raise ConfigError(where, f"no vision transformer is called {model_name!r}", names)
    return _spec(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", HEAD_WIDTH),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        output_dim=config["embed_dim"],
    )


def fitting_spec(weights: Mapping[str, Tensor]) -> Json:
    """The sizes that an OpenAI vision transformer's tensors tell, for files that name no model.

    Args:
        weights: ``visual.*``.

    Raises:
        LookupError, ValueError: these are not a vision transformer's tensors.
    """
    if any(tensor.numel() == 0 for tensor in weights.values()):
        raise ValueError("a tensor has no entries")
    width, _, _, patch_size = weights["visual.conv1.weight"].shape
    blocks = {name.split(".")[3] for name in weights if name.startswith("visual.transformer.res")}
    tokens = weights["visual.positional_embedding"].shape[0]
    hidden = weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    heads = max(1, width // HEAD_WIDTH)
    if width % heads:
        raise ValueError(f"a width of {width}")
    return _spec(
        image_size=patch_size * isqrt(tokens - 1),
        patch_size=patch_size,
        width=width,
        layers=len(blocks),
        heads=heads,
        mlp_ratio=hidden / width,
        output_dim=weights["visual.proj"].shape[1],
    )


def told_spec(told: str, fitting: Json) -> Json:
    """The sizes that the header of a file by ``save_encoder`` tells, where its tensors agree.

    ``OpenCLIPTower.from_spec`` checks the rest.

    Args:
        told: JSON.
        fitting: what the tensors tell.

    Raises:
        LookupError, ValueError, ArithmeticError, TypeError: the header does not fit the tensors.
    """
    spec = json.loads(told)
    if not isinstance(spec, dict):
        raise ValueError("its header describes no encoder")
    free = ("heads", "quick_gelu", "mean", "std")  # which no tensor's shape tells
    for name in fitting:
        if name not in free and spec[name] != fitting[name]:
            raise ValueError(f"its header says {name} {str(spec[name])[:40]}, not {fitting[name]}")
    if fitting["width"] % spec["heads"]:
        raise ValueError("its header's heads do not divide the width")
    return spec


def _spec(**sizes: object) -> Json:
    # OpenAI trained with QuickGELU; OpenCLIP's configs say so only under names of their own.
    return sizes | {"family": "openclip", "quick_gelu": True, "mean": list(MEAN), "std": list(STD)}
