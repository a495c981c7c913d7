"""Task-conditional models among FusionBench's vision models.

FusionBench's Hugging Face task pool calls a model, projects and normalises its output, and names
the task only then, to ``compute_surgery_features``; its OpenCLIP task pool never names one. The
task pools of this package name the task before the forward pass (``.taskpools``). In FusionBench's
own, the images of the last forward pass are remembered, and a second one pays for the numbers of
the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.base import VisionTower
from ..model.model import InterventionModel
from ..model.protocols import TaskConditionalModel


class _NamedAfterwards(nn.Module):
    """FusionBench's protocol for models whose features depend on the task.

    Attributes:
        is_surgery_model: tells FusionBench to ask ``compute_surgery_features``.
    """

    is_surgery_model = True
    encode: Callable[..., Tensor]
    _images: Tensor | None = None

    def _remember(self, images: Tensor) -> None:
        # a copy: the host may fill its buffer with the next batch meanwhile
        self._images = images.detach().clone()

    def compute_surgery_features(
        self, features: Tensor, dataset_name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the images of the last forward pass, for the task they are of.

        Args:
            features: what became of that pass's output: projected, normalised.
            dataset_name: the task.

        Returns:
            L2-normalised features for the task (batch, projection_dim), ``features``, and the
            difference between the two.

        Raises:
            ValueError: a task that is none of the model's, or features of other images.
        """
        images, self._images = self._images, None
        if images is None or len(images) != len(features):
            raise ValueError(
                "these features are not those of the last forward pass; use encode(images, task)"
            )
        edited = self.encode(images, dataset_name)
        edited = edited / edited.norm(p=2, dim=-1, keepdim=True)
        return edited, features, features - edited


class HostedInterventionModel(_NamedAfterwards, InterventionModel):
    """An ``InterventionModel`` that FusionBench's own task pools evaluate too."""

    def forward(self, pixel_values: Tensor, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """As ``InterventionModel.forward``; without a task, the merged encoder's output.

        Raises:
            ValueError: no task, on an OpenCLIP tower, whose task pool in FusionBench never names
                one: its report would show the merged encoder's numbers as this model's.
        """
        if task is None and not self.task_is_known:
            if self.tower.family == "openclip":
                raise ValueError(
                    "no task is named, and this task pool never names one, so its report would "
                    "show the merged model; use one of our task pools "
                    "(taskpool=openclip-vit-b32_TA8, ...) or encode(images, task)"
                )
            self._remember(pixel_values)
            with self.for_task(None):
                return super().forward(pixel_values, *args, **kwargs)
        return super().forward(pixel_values, *args, task=task, **kwargs)


class HostedModel(_NamedAfterwards):
    """Any task-conditional model that FusionBench's own task pools evaluate too.

    Args:
        model: the model.
        like: an encoder of its architecture, for the width that the host's visual projection
            takes and, with OpenCLIP, the images' preprocessing.
    """

    def __init__(self, model: TaskConditionalModel, like: VisionTower):
        super().__init__()
        self.model, self.width = model, like.width
        _copy_preprocessing(like, self)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, width) without a number in it, until the task is named."""
        self._remember(pixel_values)
        shape = (len(pixel_values), self.width)
        return torch.full(shape, torch.nan, device=pixel_values.device)

    @property
    def tasks(self) -> list[str]:
        return self.model.tasks

    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        return self.model.encode(images, task)

    def extra_parameters(self) -> Mapping[str, object]:
        return self.model.extra_parameters()


def hosted(model: nn.Module, like: VisionTower) -> nn.Module:
    """A model as FusionBench's own task pools can evaluate it; one that they can is left as it is.

    Args:
        model: any model.
        like: as in ``HostedModel``.
    """
    if isinstance(model, TaskConditionalModel) and not hasattr(model, "is_surgery_model"):
        return HostedModel(model, like)
    return model


class OneTask(nn.Module):
    """A task-conditional model while one task is evaluated: images -> that task's features.

    Attributes:
        task: the task; to be set before the first forward pass.
        train_preprocess, val_preprocess: the model's; FusionBench's OpenCLIP classifier has them.
    """

    def __init__(self, model: TaskConditionalModel):
        super().__init__()
        self.model = model
        _copy_preprocessing(model, self)
        self.task: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, image_size, image_size) -> (batch, projection_dim), not normalised."""
        if self.task is None:
            raise ValueError("no task is named")
        return self.model.encode(images, self.task)


def by_task(model: nn.Module) -> Any:
    """A task-conditional model as one that is told the task before; others as they are."""
    return OneTask(model) if isinstance(model, TaskConditionalModel) else model


def _copy_preprocessing(source: object, target: object) -> None:
    for name in ("train_preprocess", "val_preprocess"):
        setattr(target, name, getattr(source, name, None))
