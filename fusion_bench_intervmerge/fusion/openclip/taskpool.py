"""FusionBench's OpenCLIP task pool, which tells a model the task it is evaluated on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from fusion_bench.dataset.clip_dataset import CLIPDataset
from fusion_bench.models.open_clip import ImageClassifier
from fusion_bench.taskpool.openclip_vision.openclip_taskpool import (
    OpenCLIPVisionModelTaskPool as HostOpenCLIPVisionModelTaskPool,
)
from fusion_bench.utils import instantiate
from lightning.fabric import is_wrapped
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from fusion_bench_intervmerge.errors import ConfigError
from fusion_bench_intervmerge.model import InterventionModel

from .pool import read_head


class OpenCLIPVisionModelTaskPool(HostOpenCLIPVisionModelTaskPool):
    """Evaluates OpenCLIP encoders; a repaired one with each task's edits on that task's images.

    It takes the configs of FusionBench's pool of that name. Heads are read as the model pool reads
    them, and images are prepared as the encoder says, so that nothing is downloaded.
    """

    def evaluate(self, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        """Evaluate an encoder on every task.

        Args:
            model: images -> image features, with ``train_preprocess`` and ``val_preprocess``.

        Returns:
            FusionBench's report: per task, and on average, accuracy and loss.

        Raises:
            ConfigError: a head is missing.
            ValueError: the model is a repaired one that has no edits for a task.
        """
        self.processor = model.val_preprocess
        return super().evaluate(model, **kwargs)

    def setup(self) -> None:
        """Loads the datasets and the heads."""
        heads = {}
        for name in self._test_datasets:
            where = f"taskpool.classification_heads.{name}"
            if name not in self._classifier_heads:
                raise ConfigError(where, "there is a dataset but no head", "a path or a _target_")
            heads[name] = read_head(self._classifier_heads[name], where)
        self.classifier_heads = {name: head.to(self.fabric.device) for name, head in heads.items()}
        self.test_datasets = {
            name: CLIPDataset(
                instantiate(dataset) if isinstance(dataset, DictConfig) else dataset, self.processor
            )
            for name, dataset in self._test_datasets.items()
        }
        self.test_dataloaders = {
            name: self.fabric.setup_dataloaders(DataLoader(dataset, **self._dataloader_kwargs))
            for name, dataset in self.test_datasets.items()
        }
        self._is_setup = True

    def _evaluate(
        self, classifier: ImageClassifier, test_loader: DataLoader, num_classes: int, task_name: str
    ) -> dict[str, float]:
        encoder = classifier.image_encoder
        if is_wrapped(encoder):
            encoder = encoder.module
        repaired = isinstance(encoder, InterventionModel)
        with encoder.for_task(task_name) if repaired else nullcontext():
            return super()._evaluate(classifier, test_loader, num_classes, task_name)
