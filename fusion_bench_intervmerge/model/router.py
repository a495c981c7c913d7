"""What a router reads: for each image, a few numbers of the states that no edit reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ..config import Json, Settings, whole

# == routing.reading
# What a router reads: for each image, a few numbers of the states that no edit reaches.
# A number that moves less than this share of most others is a constant and its rounding.
_CONSTANT = 1e-3


def rows_of(prefix: Tensor, num_tokens: int, prefix_tokens: int = 1) -> Tensor:
    """One row an image, from what a ``Prefix`` keeps.

    Mean, standard deviation, largest and smallest value over the patch tokens, behind the class
    token as it is (and its self-attention output, where that is common to all tasks).

    Args:
        prefix: image features (batch, projection_dim), or tokens (batch, any, width).
        num_tokens, prefix_tokens: of the encoder, and how many of them stand before the patches.

    Returns:
        (batch, dims), float64, on the CPU.
    """
    states = prefix.detach().float()
    if states.ndim == 2:
        return states.double().cpu()
    # the last block's prefix has no patch tokens, the others one or two vectors before them
    before = 2 if states.shape[1] == 2 else states.shape[1] - (num_tokens - prefix_tokens)
    first, patches = states[:, :before].flatten(1), states[:, before:]
    if patches.shape[1]:
        mean = patches.mean(1)
        # torch's own std takes a hundred times as long over a dimension in the middle
        deviation = (patches - mean[:, None]).square().mean(1).sqrt()
        first = torch.cat([first, mean, deviation, patches.amax(1), patches.amin(1)], dim=1)
    return first.double().cpu()


@dataclass
class Reading:
    """Rows -> their leading principal components, each number in units of its own deviation.

    It is made once, of the images that the router was first fitted on; tasks that come later are
    read by it as it is, so that nothing known of the others changes.

    Attributes:
        mean: (dims of a row,).
        directions: (dims of a row, components).
    """

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, rows: Tensor, components: int) -> Reading:
        """The principal components of rows (images, dims of a row)."""
        mean, deviation = rows.mean(0), rows.std(0)
        moves = deviation > _CONSTANT * deviation.quantile(0.75)
        scale = torch.where(moves, 1 / deviation, 0)
        scaled = (rows - mean) * scale
        # By the eigenvectors of the smaller square: singular vectors take five times as long.
        few = len(scaled) < scaled.shape[1]
        _, axes = torch.linalg.eigh(scaled @ scaled.T if few else scaled.T @ scaled)
        leading = axes.flip(1)[:, : min(components, len(rows) - 1)]
        if few:
            leading = normalize(scaled.T @ leading, dim=0)
        # in the precision of the file, so that a saved router routes as it did
        return cls(mean.float(), (scale[:, None] * leading).float())

    def __call__(self, rows: Tensor) -> Tensor:
        """(images, dims of a row) -> (images, components), float64."""
        return (rows - self.mean) @ self.directions.double()

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "directions": self.directions}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Reading:
        """What ``tensors`` gave.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        if tensors.keys() != {"mean", "directions"}:
            raise ValueError(f"reading has {sorted(tensors)}, and needs ['directions', 'mean']")
        mean, directions = tensors["mean"], tensors["directions"]
        if mean.ndim != 1 or directions.ndim != 2 or len(directions) != len(mean):
            raise ValueError(
                f"reading.mean and reading.directions of shapes {tuple(mean.shape)} and "
                f"{tuple(directions.shape)} do not fit"
            )
        if not (mean.isfinite().all() and directions.isfinite().all()):
            raise ValueError("reading has numbers that are not finite")
        return cls(mean, directions)


# == routing.settings
# What a user may say of a router.
class RouterSettings(Settings):
    """What tells the task of an image.

    Args:
        name: ``gaussian``, the only one.
        images: at most so many images a task to fit it on, of those that the edits saw.
        dims: numbers that an image is told by: the leading principal components of what it reads.
        threshold: share of a task's own images that may be refused as of no known task; null
            refuses none.
    """

    name: Literal["gaussian"] = "gaussian"
    images: Annotated[int, whole(2, 10**9)] = 512
    dims: Annotated[int, whole(1, 2**16)] = 64
    threshold: Annotated[
        float | None, Field(ge=0, le=0.5, description="null, or a number in [0, 0.5]")
    ] = None


def read_settings(value: object) -> RouterSettings:
    """A router's name alone, or a mapping, or settings as they are.

    Raises:
        ConfigError: neither, or a setting that does not fit.
    """
    if isinstance(value, RouterSettings):
        return value
    return RouterSettings.read({"name": value} if isinstance(value, str) else value)


# == routing.routers.base
# The base class of routers.
Kept = dict[str, Tensor]
FOLDS = 4
QUANTILES = 51  # of the shares 0, 0.01, ... 0.5


class Router(ABC):
    """Tells the task of an image by what is kept of each task's images.

    What is kept of a task follows from its own images alone: tasks are added and dropped, and the
    others' stay to the bit.

    Args:
        reading: from states to the rows that the router sees.
        settings: what it was asked for.

    Attributes:
        threshold: share of a task's own images that may be refused; None refuses none.
        kept: task -> named tensors, float32 as they are saved.
    """

    name: ClassVar[str]

    def __init__(self, reading: Reading, settings: RouterSettings):
        self.reading, self.settings = reading, settings
        self.threshold = settings.threshold
        self.kept: dict[str, Kept] = {}

    @abstractmethod
    def keep(self, rows: Tensor) -> Kept:
        """What is kept of a task: (images, components) -> named tensors."""

    @abstractmethod
    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        """How much rows (images, components) look like each task's: (images, tasks), float64."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shapes of what ``keep`` gives; None where the number of images decides."""

    @property
    def tasks(self) -> list[str]:
        return list(self.kept)

    def add(self, task: str, rows: Tensor) -> None:
        """Learn a task, or learn it anew, from rows of its images (images, dims of a row)."""
        rows = self.reading(rows)
        kept = self._kept(rows)
        # How well images of the task fit that it was not fitted on: what `threshold` refers to.
        fold, fit = torch.arange(len(rows)) % FOLDS, torch.empty(len(rows), dtype=torch.float64)
        for held_out in fold.unique():
            inside, outside = fold != held_out, fold == held_out
            others = {**self.kept, task: self._kept(rows[inside])}
            fit[outside] = self.scores(others, rows[outside])[:, list(others).index(task)]
        shares = torch.linspace(0, 0.5, QUANTILES, dtype=torch.float64)
        self.kept[task] = kept | {"quantiles": fit.quantile(shares).float()}

    def _kept(self, rows: Tensor) -> Kept:
        return {name: tensor.float().contiguous() for name, tensor in self.keep(rows).items()}

    def drop(self, task: str) -> None:
        """Forget a task; one that was never learnt is none to forget."""
        self.kept.pop(task, None)

    def __call__(self, rows: Tensor) -> list[str | None]:
        """The task of each row (images, dims of a row); None: of no known task."""
        best, index = self.scores(self.kept, self.reading(rows)).max(dim=1)
        tasks: list[str | None] = [self.tasks[i] for i in index.tolist()]
        if self.threshold is None:
            return tasks
        place = torch.tensor(self.threshold * 2 * (QUANTILES - 1), dtype=torch.float64)
        low, high = (
            torch.stack([k["quantiles"][int(at)] for k in self.kept.values()]).double()
            for at in (place.floor(), place.ceil())
        )
        least = low.lerp(high, place - place.floor())
        refused = best < least[index]
        return [None if no else t for t, no in zip(tasks, refused.tolist(), strict=True)]

    # -- as files ----------------------------------------------------------------------------------

    def config(self) -> Json:
        """Its settings as JSON values."""
        return self.settings.to_dict() | {"threshold": self.threshold}

    def count(self) -> int:
        """How many numbers it is."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name: ``reading.<tensor>`` and ``tasks.<task>.<tensor>``."""
        found = {f"reading.{name}": tensor for name, tensor in self.reading.tensors().items()}
        for task, kept in self.kept.items():
            found |= {f"tasks.{task}.{name}": tensor for name, tensor in kept.items()}
        return found

    def load(self, task: str, kept: Kept) -> None:
        """Take over what was kept of a task.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape, or not finite.
        """
        shapes = self.shapes() | {"quantiles": (QUANTILES,)}
        if kept.keys() != shapes.keys():
            raise ValueError(f"task {task!r} has {sorted(kept)}, and needs {sorted(shapes)}")
        for name, shape in shapes.items():
            found = tuple(kept[name].shape)
            fits = len(found) == len(shape) and all(
                wanted in (None, size) for wanted, size in zip(shape, found, strict=True)
            )
            if not fits or not kept[name].isfinite().all():
                raise ValueError(f"tasks.{task}.{name} does not fit, or has no finite numbers")
        self.kept[task] = kept

    @property
    def components(self) -> int:
        """How many numbers a row has."""
        return self.reading.directions.shape[1]


# == routing.routers.gaussian
# A Gaussian a task, with a covariance of its own.
PRIOR = 20.0  # images


class Gaussian(Router):
    """log N(x; m, S) with S = (scatter + 20 v I) / (n - 1 + 20), v the task's mean variance.

    A sphere counts as much as 20 images: with few images the distance is nearly Euclidean, with
    many it follows the task's own covariance.
    """

    name = "gaussian"

    def keep(self, rows: Tensor) -> Kept:
        """The number of images, their mean, and the lower triangle of their scatter matrix."""
        moved = rows - rows.mean(0)
        scatter = moved.T @ moved
        corner = torch.tril_indices(*scatter.shape)
        return {
            "count": torch.tensor(float(len(rows))),
            "mean": rows.mean(0),
            "scatter": scatter[corner[0], corner[1]],
        }

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        size = self.components
        return {"count": (), "mean": (size,), "scatter": (size * (size + 1) // 2,)}

    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        count, mean, scatter = stacked(kept, self.components)
        degrees = count - 1
        variance = scatter.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)[:, None]
        sphere = (variance / degrees.clamp_min(1)).clamp_min(1e-12) * torch.eye(self.components)
        factor = torch.linalg.cholesky((scatter + PRIOR * sphere) / (degrees + PRIOR))
        return log_density(factor, rows - mean)


def stacked(kept: Mapping[str, Kept], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tasks, float64: counts (tasks, 1, 1), means (tasks, 1, size), scatter matrices."""
    count, mean, triangle = (
        torch.stack([of[name] for of in kept.values()]).double()
        for name in ("count", "mean", "scatter")
    )
    scatter = triangle.new_zeros(len(kept), size, size)
    row, column = torch.tril_indices(size, size)
    scatter[:, row, column] = scatter[:, column, row] = triangle
    return count[:, None, None], mean[:, None], scatter


def log_density(factor: Tensor, moved: Tensor) -> Tensor:
    """log N(x; 0, L L') but for a constant.

    L (tasks or 1, size, size), x (tasks, images, size) -> (images, tasks).
    """
    white = torch.linalg.solve_triangular(factor, moved.mT, upper=False)
    volume = factor.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)
    return (-0.5 * white.square().sum(1) - volume).T


def read_router(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], tasks: Sequence[str]
) -> Router:
    """What ``Router.config`` and ``Router.tensors`` gave.

    Args:
        config: its settings.
        tensors: by name; ``reading.<tensor>`` and ``tasks.<task>.<tensor>``.
        tasks: of the model.

    Raises:
        ValueError: what does not fit, in one line.
    """
    settings = RouterSettings.read(config, "router")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = tensor.float()
    router = Gaussian(Reading.of(groups.pop("reading", {})), settings)
    # in the model's order, which the file does not keep
    for task in tasks:
        if f"tasks.{task}" in groups:
            router.load(task, groups.pop(f"tasks.{task}"))
    for group in groups:
        raise ValueError(f"{group} belongs to none of the model's tasks")
    if not router.tasks:
        raise ValueError("it knows no task")
    return router
