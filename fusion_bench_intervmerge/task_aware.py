"""Vision models whose features depend on the task, in a host that names it late or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .deferred import DeferredTensor


class TaskAwareModel(nn.Module, ABC):
    """What FusionBench's task pools see.

    Its Hugging Face task pool calls the model, projects and normalises the output, and then asks
    ``compute_surgery_features`` for the features of a task. So an output without a task is put off
    until it is known whose it should be, and each image costs one forward pass. Its OpenCLIP task
    pool never names a task, and gets an error instead of another model's numbers.
    """

    is_surgery_model = True

    @abstractmethod
    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features (batch, projection_dim) for a task; None: of the merged encoder."""

    @abstractmethod
    def native(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The vision tower's own output, for the task at hand."""

    @abstractmethod
    def for_task(
        self, task: str | Sequence[str] | None, batch: int | None = None
    ) -> AbstractContextManager[None]:
        """Every forward pass inside is for this task; None: the merged encoder's."""

    @abstractmethod
    def check_task(self, task: str) -> None:
        """Raise ValueError when the task is none of the model's."""

    @property
    @abstractmethod
    def task_follows(self) -> bool:
        """Whether the host names the task after the forward pass."""

    @property
    @abstractmethod
    def task_is_known(self) -> bool:
        """Whether the running code is inside ``for_task``."""

    def forward(self, pixel_values: Tensor, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """The output of the vision tower's own forward pass.

        Args:
            pixel_values: images (batch, 3, image_size, image_size).
            task: as in ``encode``; without one (and outside ``for_task``) the merged encoder's
                output, or, where the host names the task only afterwards, an output that is
                computed when it is known whose it should be.

        Raises:
            ValueError: no task, on a tower whose host never names one: its report would show the
                merged encoder's numbers as this model's.
        """
        if task is not None:
            with self.for_task(task, len(pixel_values)):
                return self.native(pixel_values, *args, **kwargs)
        if self.task_is_known:
            return self.native(pixel_values, *args, **kwargs)
        if not self.task_follows:
            raise ValueError(
                "no task is named, and this task pool never names one, so its report would show "
                "the merged model; use one of our task pools (taskpool=openclip-vit-b32_TA8, ...) "
                "or encode(images, task)"
            )
        if torch.is_grad_enabled() or args or kwargs:
            with self.for_task(None):
                return self.native(pixel_values, *args, **kwargs)
        return self._deferred(pixel_values)

    def _deferred(self, images: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        images = images.clone()  # the host may fill its buffer with the next batch meanwhile

        @cache
        def merged() -> Any:
            with self.for_task(None), torch.no_grad():
                return self.native(images)

        states: Any = DeferredTensor.of(images, lambda: merged().last_hidden_state)
        pooled: Any = DeferredTensor.of(images, lambda: merged().pooler_output)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

    def compute_surgery_features(
        self, features: Tensor | Callable[[nn.Module], Tensor], dataset_name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """FusionBench's protocol for task-specific features.

        Args:
            features: what became of this model's output (projected, normalised), or a function of
                the model that computes it.
            dataset_name: the task.

        Returns:
            L2-normalised features for the task (batch, projection_dim), the merged encoder's, and
            the difference between the two.

        Raises:
            ValueError: a task that is none of the model's, or features of unknown images.
        """
        self.check_task(dataset_name)
        if not isinstance(features, Tensor):
            with self.for_task(None):
                merged = features(self)
            with self.for_task(dataset_name):
                edited = features(self)
            return edited, merged, merged - edited
        if not isinstance(features, DeferredTensor):
            raise ValueError(
                "these features were computed before the task was known; run the model under "
                "torch.no_grad(), or use encode(images, task)"
            )
        edited = self.encode(features.images, dataset_name)
        edited = edited / edited.norm(p=2, dim=-1, keepdim=True)
        return edited, features, features - edited
