"""OpenCLIP's ``VisionTransformer``, whose projection is part of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Count, Json, Settings, Size
from .base import ResidualMap, VisionTower

# OpenAI's, for towers that came without a preprocessing of their own
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _Spec(Settings):
    family: Literal["openclip"] = "openclip"
    image_size: Size
    patch_size: Size
    width: Size
    layers: Count
    heads: Size
    mlp_ratio: Annotated[float, Field(gt=0, le=64)]
    output_dim: Size
    quick_gelu: bool
    mean: Annotated[Sequence[float], Field(min_length=3, max_length=3)]
    std: Annotated[Sequence[PositiveFloat], Field(min_length=3, max_length=3)]


class OpenCLIPTower(VisionTower):
    """OpenCLIP's vision transformer with a class token, as in the task-vectors paper's encoders.

    Args:
        visual: the transformer.
        mean, std: what images are normalised with, to rebuild the preprocessing from an artifact.
    """

    family = "openclip"
    gives_features = True
    shortcuts = frozenset({"attention", "mlp", "block"})

    def __init__(self, visual: Any, mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
        super().__init__()
        self.visual = visual
        self.mean, self.std = tuple(mean), tuple(std)
        size = visual.image_size
        self.image_size = size[0] if isinstance(size, tuple) else size
        self.width = visual.conv1.out_channels
        self.num_blocks = len(visual.transformer.resblocks)
        self.num_tokens = visual.positional_embedding.shape[0]
        self.projection_dim = visual.proj.shape[1]

    @classmethod
    def wrap(cls, model: nn.Module, projection: nn.Linear | None = None) -> OpenCLIPTower | None:
        visual = getattr(getattr(model, "model", model), "visual", model)
        if not type(visual).__module__.startswith("open_clip."):
            return None
        # The preprocessing that FusionBench's ``ImageEncoder`` carries.
        for step in getattr(getattr(model, "val_preprocess", None), "transforms", []):
            if hasattr(step, "mean") and hasattr(step, "std"):
                return cls(visual, step.mean, step.std)
        return cls(visual)

    @property
    def train_preprocess(self) -> Callable[..., Tensor]:
        return self._preprocess(is_train=True)

    @property
    def val_preprocess(self) -> Callable[..., Tensor]:
        return self._preprocess(is_train=False)

    def _preprocess(self, is_train: bool) -> Callable[..., Tensor]:
        from open_clip.transform import image_transform

        return image_transform(self.visual.image_size, is_train, mean=self.mean, std=self.std)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Image features: what FusionBench's OpenCLIP pools take an encoder's output for."""
        return self.features(images)

    def embed(self, images: Tensor) -> Tensor:
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + visual.positional_embedding.to(x.dtype)
        return visual.ln_pre(x)

    def block(self, index: int) -> Any:
        return self.visual.transformer.resblocks[index]

    def attend(self, index: int, states: Tensor) -> Tensor:
        block = self.block(index)
        x = block.ln_1(states)
        # not the module's call: the site's tap comes in ``finish``
        return block.attn.forward(x[:, :1], x, x, need_weights=False)[0]

    def finish(self, index: int, state: Tensor, z: Tensor) -> Tensor:
        block = self.block(index)
        state = state + block.ls_1(self.tapped("attention", index, z))
        return self.tapped("block", index, state + block.ls_2(block.mlp(block.ln_2(state))))

    def residual_maps(self, index: int) -> tuple[ResidualMap, ResidualMap]:
        block = self.block(index)
        attention, mlp = block.attn, block.mlp

        def mixed(states: Tensor) -> Tensor:
            """What torch's own attention hands to its output projection, which it does not call."""
            x = F.linear(block.ln_1(states), attention.in_proj_weight, attention.in_proj_bias)
            heads = x.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

        def hidden(states: Tensor) -> Tensor:
            return mlp[:-1](block.ln_2(states))

        out, last = attention.out_proj, mlp[-1]
        return (
            ResidualMap(mixed, out.weight, out.bias, getattr(block.ls_1, "gamma", None)),
            ResidualMap(hidden, last.weight, last.bias, getattr(block.ls_2, "gamma", None)),
        )

    def readout(self, states: Tensor) -> Tensor:
        return self.output(self.visual.ln_post(states[:, 0]) @ self.visual.proj)

    def spec(self) -> Json:
        visual, block = self.visual, self.block(0)
        patch = visual.patch_size
        return {
            "family": self.family,
            "image_size": self.image_size,
            "patch_size": patch[0] if isinstance(patch, tuple) else patch,
            "width": self.width,
            "layers": self.num_blocks,
            "heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.c_fc.out_features / self.width,
            "output_dim": self.projection_dim,
            "quick_gelu": type(block.mlp.gelu).__name__ == "QuickGELU",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, object]) -> OpenCLIPTower:
        with torch.device("cpu"):  # as for transformers, whose import fails on the meta device
            from open_clip.transformer import QuickGELU, VisionTransformer

        read = _Spec.read(spec, "tower")
        visual = VisionTransformer(
            **read.model_dump(exclude={"family", "quick_gelu", "mean", "std"}),
            act_layer=QuickGELU if read.quick_gelu else nn.GELU,
        )
        return cls(visual.eval(), read.mean, read.std)

    def weights(self) -> dict[str, Tensor]:
        return {f"visual.{n}": t for n, t in self.visual.state_dict().items()}

    def library_model(self) -> nn.Module:
        return self

    def mergeable(self) -> dict[str, nn.Parameter]:
        return dict(self.visual.named_parameters())
