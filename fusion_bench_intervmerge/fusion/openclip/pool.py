"""FusionBench's OpenCLIP model pool, with checkpoints it can read."""

from __future__ import annotations

from typing import Any

from fusion_bench.modelpool.openclip_vision.modelpool import (
    OpenCLIPVisionModelPool as HostOpenCLIPVisionModelPool,
)
from fusion_bench.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...config import ConfigError
from ...model.model import InterventionModel
from ..host import one_line
from .checkpoints import load_encoder, load_head, save_encoder


class OpenCLIPVisionModelPool(HostOpenCLIPVisionModelPool):
    """Encoders and classification heads of the task-vectors paper, or of the same form.

    It takes the configs of FusionBench's pool of that name, reads what these point at through
    :mod:`.checkpoints`, and downloads nothing. The encoders hold the vision tower alone (see
    ``ImageEncoder``).
    """

    @one_line
    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an encoder.

        Args:
            model_name_or_config: a name in the pool, or what may stand under a name: a file's path;
                ``{model_name, pickle_path}`` or ``{model_name, state_dict_path}``, where either key
                may name a file of any format; a live module, returned as it is; a ``_target_``.

        Returns:
            a module: images (batch, 3, image_size, image_size) -> image features.

        Raises:
            ConfigError: what is wrong with the file, and which config key named it.
        """
        config, where = model_name_or_config, "modelpool.models"
        if isinstance(config, str) and config in self._models:
            where, config = f"{where}.{config}", self._models[config]
        if isinstance(config, DictConfig):
            config = OmegaConf.to_container(config, resolve=True)

        encoder: object
        if isinstance(config, str):
            encoder = load_encoder(config, where=where)
        elif isinstance(config, nn.Module):
            encoder = config
        elif "_target_" in config:
            encoder = instantiate(config, *args, **kwargs)
        else:
            key = next((k for k in ("pickle_path", "state_dict_path") if k in config), None)
            if key is None or config.keys() != {"model_name", key}:
                forms = "a path, {model_name, pickle_path}, {model_name, state_dict_path}, _target_"
                raise ConfigError(where, f"no encoder is described by {list(config)}", forms)
            encoder = load_encoder(config[key], config["model_name"], where=f"{where}.{key}")

        if self._train_processor is None:
            self._train_processor = getattr(encoder, "train_preprocess", None)
        if self._test_processor is None:
            self._test_processor = getattr(encoder, "val_preprocess", None)
        return encoder

    @one_line
    def load_classification_head(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a classification head.

        Args:
            model_name_or_config: a task's name, or what may stand under it: a file's path, a live
                head, a ``_target_``.

        Returns:
            a module: image features (batch, projection_dim) -> logits (batch, classes).

        Raises:
            ConfigError: what is wrong with the file, and which config key named it.
        """
        config, where = model_name_or_config, "modelpool.classification_heads"
        heads: Any = self._classification_heads or {}
        if isinstance(config, str) and config in heads:
            where, config = f"{where}.{config}", heads[config]
        return read_head(config, where, *args, **kwargs)

    def save_model(self, model: nn.Module, path: str, *args: object, **kwargs: object) -> None:
        """Save a model: a repaired one as its artifact, a plain encoder as safetensors."""
        if isinstance(model, InterventionModel):
            model.save_pretrained(path)
        else:
            save_encoder(model, path)


def read_head(config: Any, where: str, *args: Any, **kwargs: Any) -> Any:
    """A classification head from a path, a live head or a ``_target_``.

    Raises:
        ConfigError: what is wrong with the file.
    """
    if isinstance(config, str):
        return load_head(config, where=where)
    if isinstance(config, nn.Module):
        return config
    return instantiate(config, *args, **kwargs)
