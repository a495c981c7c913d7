"""OpenCLIP's ``VisionTransformer``, whose projection is part of the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from open_clip.transform import image_transform
from open_clip.transformer import QuickGELU, VisionTransformer
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..schema import Count, Size, Strict, checked
from .base import Edit, VisionTower, fill

# OpenAI's, for towers that came without a preprocessing of their own
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _Spec(Strict):
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
    quick_gelu = QuickGELU

    def __init__(self, visual: VisionTransformer, mean: tuple = MEAN, std: tuple = STD):
        super().__init__()
        self.visual = visual
        self.mean, self.std = tuple(mean), tuple(std)
        self.width = visual.conv1.out_channels
        self.num_blocks = len(visual.transformer.resblocks)
        self.num_tokens = visual.positional_embedding.shape[0]
        self.projection_dim = visual.proj.shape[1]
        # Releases before 2.25 run the blocks on (tokens, batch, width).
        self.batch_first = getattr(visual.transformer, "batch_first", False)

    @property
    def train_preprocess(self) -> Any:
        return image_transform(self.visual.image_size, is_train=True, mean=self.mean, std=self.std)

    @property
    def val_preprocess(self) -> Any:
        return image_transform(self.visual.image_size, is_train=False, mean=self.mean, std=self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Image features: what FusionBench's OpenCLIP pools take an encoder's output for."""
        return self.features(images)

    def embed(self, images: Tensor) -> Tensor:
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + visual.positional_embedding.to(x.dtype)
        return visual.ln_pre(x)

    def run_block(self, index: int, states: Tensor) -> Tensor:
        block = self.visual.transformer.resblocks[index]
        if self.batch_first:
            return block(states)
        return block(states.transpose(0, 1)).transpose(0, 1)

    def attend(self, index: int, states: Tensor) -> Tensor:
        block = self.visual.transformer.resblocks[index]
        x = block.ln_1(states)
        if not self.batch_first:
            x = x.transpose(0, 1)
        query = x[:, :1] if self.batch_first else x[:1]
        z = block.attn.forward(query, x, x, need_weights=False)[0]
        return z if self.batch_first else z.transpose(0, 1)

    def finish(self, index: int, state: Tensor, z: Tensor, edit: Edit) -> Tensor:
        block = self.visual.transformer.resblocks[index]
        state = state + getattr(block, "ls_1", nn.Identity())(edit("attention", index, z))
        if not self.batch_first:  # as the hooks of the MLP expect it
            state = state.transpose(0, 1)
        state = state + getattr(block, "ls_2", nn.Identity())(block.mlp(block.ln_2(state)))
        return edit("block", index, state if self.batch_first else state.transpose(0, 1))

    def readout(self, states: Tensor) -> Tensor:
        return self.output(self.visual.ln_post(states[:, 0]) @ self.visual.proj)

    def site(self, name: str, block: int) -> nn.Module:
        if name == "output":
            return self.output
        module = self.visual.transformer.resblocks[block]
        return {"attention": module.attn, "mlp": module.mlp, "block": module}[name]

    def site_tensor(self, output: Any) -> Tensor:
        z = super().site_tensor(output)
        return z if self.batch_first or z.dim() == 2 else z.transpose(0, 1)

    def spec(self) -> dict[str, Any]:
        visual, block = self.visual, self.visual.transformer.resblocks[0]
        size, patch = visual.image_size, visual.patch_size
        return {
            "family": self.family,
            "image_size": size[0] if isinstance(size, tuple) else size,
            "patch_size": patch[0] if isinstance(patch, tuple) else patch,
            "width": self.width,
            "layers": self.num_blocks,
            "heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.c_fc.out_features / self.width,
            "output_dim": self.projection_dim,
            "quick_gelu": isinstance(block.mlp.gelu, QuickGELU),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> OpenCLIPTower:
        read = checked(_Spec, dict(spec), "tower")
        visual = VisionTransformer(
            **read.model_dump(exclude={"family", "quick_gelu", "mean", "std"}),
            act_layer=QuickGELU if read.quick_gelu else nn.GELU,
        )
        return cls(visual.eval(), tuple(read.mean), tuple(read.std))

    def weights(self) -> dict[str, Tensor]:
        return {f"visual.{n}": t for n, t in self.visual.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        visual = {n.removeprefix("visual."): t for n, t in weights.items()}
        fill(self.visual, visual, "the vision tower's weights file")

    def stock(self) -> nn.Module:
        return self

    def mergeable(self) -> dict[str, nn.Parameter]:
        return dict(self.visual.named_parameters())
