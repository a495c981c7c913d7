"""FusionBench's OpenCLIP pools: checkpoints that it can read, models that are told the task."""

from __future__ import annotations

from typing import Any

from fusion_bench.modelpool.openclip_vision.modelpool import (
    OpenCLIPVisionModelPool as HostOpenCLIPVisionModelPool,
)
from fusion_bench.taskpool.openclip_vision.openclip_taskpool import (
    OpenCLIPVisionModelTaskPool as HostOpenCLIPVisionModelTaskPool,
)
from fusion_bench.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from ...config import ConfigError, Json
from ...model.model import InterventionModel
from ..host import one_line, plain
from ..hosted import OneTask, Referenced, by_task
from ..images import preprocessed
from .checkpoints import load_encoder, load_head, save_encoder


class OpenCLIPVisionModelPool(HostOpenCLIPVisionModelPool):
    """Encoders and classification heads of the task-vectors paper, or of the same form.

    It takes the configs of FusionBench's pool of that name, and downloads nothing. The encoders
    hold the vision tower alone (see ``ImageEncoder``).
    """

    @one_line
    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an encoder: images (batch, 3, image_size, image_size) -> image features.

        Args:
            model_name_or_config: a name in the pool, or what may stand under a name: a file's path;
                ``{model_name, pickle_path}`` or ``{model_name, state_dict_path}``, where either key
                may name a file of any format; a live module, returned as it is; a ``_target_``.

        Raises:
            ConfigError: what is wrong with the file, and which config key named it.
        """
        config, where = model_name_or_config, "modelpool.models"
        if isinstance(config, str) and config in self._models:
            where, config = f"{where}.{config}", self._models[config]
        encoder, config = config, plain(config)
        if isinstance(config, str):
            encoder = load_encoder(config, where=where)
        elif not isinstance(config, nn.Module) and "_target_" in config:
            encoder = instantiate(config, *args, **kwargs)
        elif not isinstance(config, nn.Module):
            key = next((k for k in ("pickle_path", "state_dict_path") if k in config), None)
            if key is None or config.keys() != {"model_name", key}:
                forms = "a path, {model_name, pickle_path}, {model_name, state_dict_path}, _target_"
                raise ConfigError(where, f"no encoder is described by {list(config)}", forms)
            encoder = load_encoder(config[key], config["model_name"], where=f"{where}.{key}")
        self._train_processor = self._train_processor or getattr(encoder, "train_preprocess", None)
        self._test_processor = self._test_processor or getattr(encoder, "val_preprocess", None)
        return encoder

    @one_line
    def load_classification_head(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a task's head (see ``read_head``): image features -> logits (batch, classes)."""
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
    return config if isinstance(config, nn.Module) else instantiate(config, *args, **kwargs)


class OpenCLIPVisionModelTaskPool(Referenced, HostOpenCLIPVisionModelTaskPool):
    """Evaluates OpenCLIP encoders, a repaired one with each task's edits on that task's images.

    It takes the configs of FusionBench's pool of that name. Images are prepared as the encoder
    says, so that nothing is downloaded.
    """

    @one_line
    def evaluate(self, model: Any, **kwargs: Any) -> Json:
        """FusionBench's report: accuracy and loss, per task and on average.

        Raises:
            ConfigError: a head is missing.
        """
        self.processor = model.val_preprocess
        return self.finish(super().evaluate(by_task(model), **kwargs), model)

    def setup(self) -> None:
        """Load the datasets and the heads."""
        host: Any = self  # whose annotations do not know that a task's name is a string
        host.classifier_heads, host.test_datasets, host.test_dataloaders = {}, {}, {}
        for task, dataset in host._test_datasets.items():
            where = f"taskpool.classification_heads.{task}"
            if task not in host._classifier_heads:
                raise ConfigError(where, "there is a dataset but no head", "a path or a _target_")
            head = read_head(host._classifier_heads[task], where)
            self.classifier_heads[task] = head.to(self.fabric.device)
            if isinstance(dataset, DictConfig):
                dataset = instantiate(dataset)
            where = f"taskpool.test_datasets.{task}"
            host.test_datasets[task] = preprocessed(dataset, host.processor, where)
            loader = DataLoader(self.test_datasets[task], **host._dataloader_kwargs)
            self.test_dataloaders[task] = self.fabric.setup_dataloaders(loader)
        self._is_setup = True

    def _evaluate(
        self, classifier: Any, test_loader: Any, num_classes: int, task_name: Any = None
    ) -> dict[str, float]:
        encoder = classifier.image_encoder
        encoder = getattr(encoder, "module", encoder)  # Fabric wraps it
        if isinstance(encoder, OneTask):
            encoder.task = task_name
        return super()._evaluate(classifier, test_loader, num_classes, task_name)
