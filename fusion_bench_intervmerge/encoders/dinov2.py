"""Hugging Face's DINOv2, with and without registers (arXiv 2304.07193, 2309.16588)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Json, Settings, Size
from .base import OF_THE_LIBRARY, ResidualMap, Sizes, VisionTower


class _Sizes(Sizes):
    mlp_ratio: float = Field(gt=0, le=64)
    num_register_tokens: int = Field(0, ge=0, le=1000)


class _Spec(Settings):
    family: Literal["dinov2"]
    config: Json
    image_size: Size
    pooling: Literal["class", "class and patches"]


class DINOv2Tower(VisionTower):
    """A ``Dinov2Model`` or ``Dinov2WithRegistersModel``; there is no projection.

    The sites ``attention`` and ``mlp`` are behind the layer scale: what is added to the stream.
    Image features are what the model's user reads, behind the last layer norm: the class token, the
    model's pooled output (``class``); of a model for image classification the class token and the
    patches' mean side by side, which its head takes (``class and patches``).

    Args:
        model: the model, without a head.
        image_size: of the images, if it is not the one that the position embeddings are for; they
            are interpolated then.
        pooling: ``class`` or ``class and patches``.
    """

    family = "dinov2"
    title = "DINOv2"
    hub_task = "image-feature-extraction"
    sites = {"attention": "layer_scale1", "mlp": "layer_scale2"}  # noqa: RUF012

    def __init__(self, model: nn.Module, image_size: int | None = None, pooling: str = "class"):
        super().__init__()
        self.model = model
        config = self.config
        self.image_size = image_size or config.image_size
        self.pooling, self.reads_patches = pooling, pooling != "class"
        self.prefix_tokens = 1 + getattr(config, "num_register_tokens", 0)
        self.num_tokens = self.prefix_tokens + (self.image_size // config.patch_size) ** 2
        self.num_blocks, self.width = config.num_hidden_layers, config.hidden_size
        self.projection_dim = self.width * (2 if self.reads_patches else 1)

    @classmethod
    def wrap(cls, model: nn.Module, projection: nn.Linear | None = None) -> DINOv2Tower | None:
        if getattr(getattr(model, "config", None), "model_type", None) not in _MODELS:
            return None
        if hasattr(model, "classifier"):
            return cls(cast(nn.Module, model.base_model), pooling="class and patches")
        return cls(model)

    @property
    def config(self) -> Any:
        return self.model.config

    def embed(self, images: Tensor) -> Tensor:
        states = self.model.embeddings(images)
        if states.shape[1] != self.num_tokens:
            given = images.shape[-1]
            raise ValueError(
                f"images of {given} pixels, not {self.image_size}: "
                f"DINOv2Tower(model, image_size={given})"
            )
        return states

    def block(self, index: int) -> Any:
        return self.model.encoder.layer[index]

    def residual_maps(self, index: int) -> tuple[ResidualMap, ResidualMap]:
        block = self.block(index)
        # transformers 5 names them otherwise
        out = getattr(block.attention, "o_proj", None) or block.attention.output.dense
        last = getattr(block.mlp, "weights_out", None) or block.mlp.fc2  # of SwiGLU, or plain
        attention, mlp = block.layer_scale1.lambda1, block.layer_scale2.lambda1

        def mixed(states: Tensor) -> Tensor:
            return _input_of(out, block.attention, block.norm1(states))

        def hidden(states: Tensor) -> Tensor:
            return _input_of(last, block.mlp, block.norm2(states))

        return (
            ResidualMap(mixed, out.weight, out.bias, attention),
            ResidualMap(hidden, last.weight, last.bias, mlp),
        )

    def readout(self, states: Tensor) -> Tensor:
        if not self.reads_patches:
            return self.output(self.model.layernorm(states[:, 0]))
        states = self.model.layernorm(states)
        patches = states[:, self.prefix_tokens :].mean(dim=1)
        return self.output(torch.cat([states[:, 0], patches], dim=1))

    def spec(self) -> Json:
        config = self.config.to_diff_dict()
        config = {k: v for k, v in config.items() if k not in (*OF_THE_LIBRARY, "id2label")}
        config["model_type"] = self.config.model_type
        own = {"image_size": self.image_size, "pooling": self.pooling}
        return {"family": self.family, "config": config, **own}

    @classmethod
    def from_spec(cls, spec: Mapping[str, object]) -> DINOv2Tower:
        read = _Spec.read(spec, "tower")
        settings = dict(read.config)
        name = _MODELS[str(settings.pop("model_type", None))]
        with torch.device("cpu"):  # the import fails on the meta device
            import transformers

            make_config = getattr(transformers, f"{name}Config")
            make_model = getattr(transformers, f"{name}Model")
        config = make_config(**settings)
        _Sizes.read(config.to_dict(), "tower.config")
        return cls(make_model(config).eval(), read.image_size, read.pooling)

    def library_config(self) -> Json:
        architecture = f"{_MODELS[self.config.model_type]}Model"
        return {**self.spec()["config"], "architectures": [architecture]}


# model type -> how transformers' classes of it begin
_MODELS = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


def _input_of(linear: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """What a linear map inside a module reads while the module runs on x."""
    read: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        module(x)
    finally:
        hook.remove()
    return read[0]
