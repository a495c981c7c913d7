"""FusionBench's OpenCLIP task pool, which names to a model the task that it is evaluated on."""

from __future__ import annotations

from typing import Any

from fusion_bench.models.open_clip import ImageClassifier
from fusion_bench.taskpool.openclip_vision.openclip_taskpool import (
    OpenCLIPVisionModelTaskPool as HostOpenCLIPVisionModelTaskPool,
)
from fusion_bench.utils import instantiate
from lightning.fabric import is_wrapped
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from ...config import ConfigError, Json
from ..host import one_line
from ..hosted import OneTask, Referenced, by_task, unseen_tasks
from ..images import preprocessed
from .pool import read_head


class OpenCLIPVisionModelTaskPool(Referenced, HostOpenCLIPVisionModelTaskPool):
    """Evaluates OpenCLIP encoders, a repaired one with each task's edits on that task's images.

    It takes the configs of FusionBench's pool of that name. Heads are read as the model pool reads
    them, and images are prepared as the encoder says, so that nothing is downloaded.
    """

    @one_line
    def evaluate(self, model: Any, **kwargs: Any) -> Json:
        """Evaluate an encoder on every task.

        Args:
            model: images -> image features, with ``train_preprocess`` and ``val_preprocess``.

        Returns:
            FusionBench's report: accuracy and loss, per task and on average.

        Raises:
            ConfigError: a head is missing.
        """
        self.processor = model.val_preprocess
        report = super().evaluate(by_task(model), **kwargs)
        for task in unseen_tasks(model, self._test_datasets):
            report[task]["unseen"] = True
        self.finish_evaluation(model)
        return report

    def setup(self) -> None:
        """Load the datasets and the heads."""
        host: Any = self  # whose annotations do not know that a task's name is a string
        self.classifier_heads, self.test_datasets, self.test_dataloaders = {}, {}, {}
        for task, dataset in host._test_datasets.items():
            where = f"taskpool.classification_heads.{task}"
            if task not in host._classifier_heads:
                raise ConfigError(where, "there is a dataset but no head", "a path or a _target_")
            head = read_head(host._classifier_heads[task], where)
            self.classifier_heads[task] = head.to(self.fabric.device)
            if isinstance(dataset, DictConfig):
                dataset = instantiate(dataset)
            where = f"taskpool.test_datasets.{task}"
            self.test_datasets[task] = preprocessed(dataset, host.processor, where)
            loader = DataLoader(self.test_datasets[task], **host._dataloader_kwargs)
            self.test_dataloaders[task] = self.fabric.setup_dataloaders(loader)
        self._is_setup = True

    def _evaluate(
        self,
        classifier: ImageClassifier,
        test_loader: DataLoader[Any],
        num_classes: int,
        task_name: str,
    ) -> dict[str, float]:
        encoder: Any = classifier.image_encoder
        if is_wrapped(encoder):
            encoder = encoder.module
        if isinstance(encoder, OneTask):
            encoder.task = task_name
        return super()._evaluate(classifier, test_loader, num_classes, task_name)
