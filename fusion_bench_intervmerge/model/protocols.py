"""The protocols of a model whose features depend on a task, and of what makes one.

A repair of ours edits activations; a rival may edit weights, choose among experts, or route. All
of them are compared through these two protocols.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from ..config import Settings
from ..data import ImageDataset
from ..encoders.base import VisionTower
from ..results import Result


@runtime_checkable
class TaskConditionalModel(Protocol):
    """A module whose image features depend on the task that the images are of."""

    @property
    def tasks(self) -> list[str]:
        """The tasks it can encode for."""

    def encode(self, images: Tensor, task: str | Sequence[str] | None = None) -> Tensor:
        """Image features for one task, or for one task per image.

        (batch, 3, image_size, image_size) -> (batch, projection_dim), after the visual projection,
        not normalised.
        """

    def extra_parameters(self) -> Mapping[str, Any]:
        """What inference needs beyond one merged model, over all tasks.

        ``total``: numbers; perhaps ``bytes``, if these are not four per number.
        """


class Experts(Protocol):
    """Experts and their images; FusionBench's model pools are read as this."""

    tasks: list[str]

    def tower(self, name: str) -> VisionTower:
        """A task's expert, or ``_pretrained_``; a fresh one, which the caller may change."""

    def images(self, task: str, split: str) -> ImageDataset:
        """A split's images, preprocessed: items are (pixel values, label), -1 for no label."""


class Repair(ABC):
    """Makes a task-conditional model of a merged encoder and the experts.

    A new one is one file: a class with ``repair``, and a config with its ``_target_``.

    Attributes:
        Settings: what a config may set; ``steps`` and ``data`` among them follow a comparison's.
    """

    Settings: ClassVar[type[Settings]] = Settings

    @abstractmethod
    def repair(self, pool: Experts, merged: VisionTower) -> nn.Module:
        """Repair a merge.

        Args:
            pool: the experts and their images.
            merged: the merged encoder; it is the callee's to keep.

        Returns:
            A ``TaskConditionalModel``.
        """

    def seeded(self, pool: Experts) -> bool:
        """Whether a setting ``seed`` changes the result, so that several make sense."""
        return False

    def look_ahead(self, pool: Experts, tower: VisionTower) -> None:  # noqa: B027 (may be nothing)
        """Raise now what would fail after the merge: what is missing, or does not fit.

        Args:
            pool: the experts and their images.
            tower: one of the pool's; it is used up.
        """

    def record(self, model: TaskConditionalModel) -> Result:
        """The last repair as a result; the caller adds ``base``, ``method`` and times."""
        extra = model.extra_parameters()
        return Result(
            kind="rival",
            extra_parameters=extra["total"],
            bytes=extra.get("bytes"),
            needs_task=True,
        )

    def clear(self) -> None:  # noqa: B027 (most keep nothing)
        """Remove files kept on disk for a repair that might have been stopped."""
