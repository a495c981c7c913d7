"""FusionBench's Hugging Face task pool, which tells a model the task before it sees the images."""

from __future__ import annotations

from typing import Any

from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.taskpool import CLIPVisionModelTaskPool as HostCLIPVisionModelTaskPool

from ..config import Json
from .hosted_models import OneTask, by_task


class CLIPVisionModelTaskPool(HostCLIPVisionModelTaskPool):
    """Evaluates Hugging Face's CLIP vision encoders, and any ``TaskConditionalModel``.

    It takes the configs of FusionBench's pool of that name and gives the same numbers; an image of
    a task-conditional model costs one forward pass instead of two.
    """

    def evaluate(self, model: Any, name: str | None = None, **kwargs: Any) -> Json:
        """FusionBench's report: per task, and on average, accuracy and loss.

        Raises:
            ValueError: the model does not know a task of the pool's.
        """
        return super().evaluate(by_task(model), name, **kwargs)

    def on_task_evaluation_begin(self, classifier: HFCLIPClassifier, task_name: str) -> None:
        """Name the task to the model."""
        super().on_task_evaluation_begin(classifier, task_name)
        model = classifier.clip_model.vision_model
        if isinstance(model, OneTask):
            model.task = task_name
            # what comes out is projected already: edits of the image features act behind that
            classifier.get_image_features = model.forward  # type: ignore[method-assign]
