"""Which task an image is of: one Gaussian per task over a few numbers that no edit changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import Self

from ..config import Json, Settings, whole
from ..encoders.base import check_fit

# A number that varies less than this share of most others is a constant and its rounding.
_CONSTANT = 1e-3
PRIOR = 20.0  # images
FOLDS = 4
QUANTILES = 51  # of the shares 0, 0.01, ... 0.5

Statistics = dict[str, Tensor]  # of one task's images, float32 as they are saved


class RouterSettings(Settings):
    """What tells the task of an image.

    Args:
        name: ``gaussian``, the only one.
        images: at most so many images per task to fit it on, of those that the edits saw.
        dims: the number of leading principal components that an image is described by.
        threshold: share of a task's own images that may be refused as of no known task; null
            refuses none.
    """

    name: Literal["gaussian"] = "gaussian"
    images: Annotated[int, whole(2, 10**9)] = 512
    dims: Annotated[int, whole(1, 2**16)] = 64
    threshold: Annotated[
        float | None, Field(ge=0, le=0.5, description="null, or a number in [0, 0.5]")
    ] = None

    @classmethod
    def read(cls, value: object, where: str = "") -> Self:
        """As ``Settings.read``; a router's name alone will do."""
        return super().read({"name": value} if isinstance(value, str) else value, where)


def rows_of(states: Tensor, num_tokens: int, prefix_tokens: int = 1) -> Tensor:
    """One row per image, from what ``Prefix.read`` gives of it.

    Mean, standard deviation, largest and smallest value over the patch tokens, behind the class
    token as it is (and its self-attention output, if that is common to all tasks).

    Args:
        states: image features (batch, projection_dim), or tokens (batch, any, width).
        num_tokens, prefix_tokens: of the encoder, and how many of them stand before the patches.

    Returns:
        (batch, dims), float64, on the CPU.
    """
    states = states.detach().float()
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

    It is made once, of the images that the router was first fitted on; tasks that are added later
    are read by the same, so that nothing changes for the others.

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
        varies = deviation > _CONSTANT * deviation.quantile(0.75)
        scale = torch.where(varies, 1 / deviation, 0)
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


class Router:
    """The task under whose Gaussian an image's row is most likely.

    log N(x; m, S) with S = (scatter + 20 v I) / (n - 1 + 20), v the task's mean variance: a sphere
    counts as much as 20 images, so that with few images the distance is nearly Euclidean, and with
    many it follows the task's own covariance.

    The statistics of a task follow from its own images alone: tasks are added and dropped, and the
    others' stay to the bit.

    Args:
        reading: from rows to the components that the Gaussians are over.
        settings: how it was fitted.

    Attributes:
        threshold: share of a task's own images that may be refused; None refuses none.
        by_task: task -> its statistics: ``count``, ``mean``, the lower triangle of ``scatter``, and
            ``quantiles`` of the log likelihood of images that the Gaussian was not fitted on.
    """

    def __init__(self, reading: Reading, settings: RouterSettings):
        self.reading, self.settings = reading, settings
        self.threshold = settings.threshold
        self.by_task: dict[str, Statistics] = {}

    @property
    def tasks(self) -> list[str]:
        return list(self.by_task)

    def statistics(self, rows: Tensor) -> Statistics:
        """Of rows (images, components), but for the quantiles."""
        centred = rows - rows.mean(0)
        scatter = centred.T @ centred
        lower = torch.tril_indices(*scatter.shape)
        triangle = scatter[lower[0], lower[1]]
        return {"count": torch.tensor(len(rows)), "mean": rows.mean(0), "scatter": triangle}

    def scores(self, by_task: Mapping[str, Statistics], rows: Tensor) -> Tensor:
        """Log likelihoods of rows (images, components): (images, tasks), float64."""
        count, mean, scatter = stacked(by_task)
        degrees = count - 1
        variance = scatter.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)[:, None]
        sphere = (variance / degrees.clamp_min(1)).clamp_min(1e-12) * torch.eye(rows.shape[1])
        factor = torch.linalg.cholesky((scatter + PRIOR * sphere) / (degrees + PRIOR))
        return log_density(factor, rows - mean)

    def add(self, task: str, rows: Tensor) -> None:
        """Learn a task, or learn it anew, from rows of its images (images, dims of a row)."""
        rows = self.reading(rows)
        # How well images of the task fit that it was not fitted on: what `threshold` refers to.
        fold, fit = torch.arange(len(rows)) % FOLDS, torch.empty(len(rows), dtype=torch.float64)
        for held_out in fold.unique():
            inside, outside = fold != held_out, fold == held_out
            others = {**self.by_task, task: self._fit(rows[inside])}
            fit[outside] = self.scores(others, rows[outside])[:, list(others).index(task)]
        shares = torch.linspace(0, 0.5, QUANTILES, dtype=torch.float64)
        self.by_task[task] = self._fit(rows) | {"quantiles": fit.quantile(shares).float()}

    def _fit(self, rows: Tensor) -> Statistics:
        return {name: t.float().contiguous() for name, t in self.statistics(rows).items()}

    def drop(self, task: str) -> None:
        """Forget a task, if it is known."""
        self.by_task.pop(task, None)

    def __call__(self, rows: Tensor) -> list[str | None]:
        """The task of each row (images, dims of a row); None: of no known task."""
        best, index = self.scores(self.by_task, self.reading(rows)).max(dim=1)
        tasks: list[str | None] = [self.tasks[i] for i in index.tolist()]
        if self.threshold is None:
            return tasks
        place = torch.tensor(self.threshold * 2 * (QUANTILES - 1), dtype=torch.float64)
        low, high = (
            torch.stack([s["quantiles"][int(at)] for s in self.by_task.values()]).double()
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
        reading = {f"reading.{name}": tensor for name, tensor in vars(self.reading).items()}
        return reading | {
            f"tasks.{task}.{name}": tensor
            for task, statistics in self.by_task.items()
            for name, tensor in statistics.items()
        }


def stacked(by_task: Mapping[str, Statistics]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tasks, float64: counts (tasks, 1, 1), means (tasks, 1, size), scatter matrices."""
    count, mean, triangle = (
        torch.stack([statistics[name] for statistics in by_task.values()]).double()
        for name in ("count", "mean", "scatter")
    )
    size = mean.shape[1]
    scatter = triangle.new_zeros(len(by_task), size, size)
    row, column = torch.tril_indices(size, size)
    scatter[:, row, column] = scatter[:, column, row] = triangle
    return count[:, None, None], mean[:, None], scatter


def log_density(factor: Tensor, centred: Tensor) -> Tensor:
    """log N(x; 0, L L') but for a constant.

    L (tasks or 1, size, size), x (tasks, images, size) -> (images, tasks).
    """
    white = torch.linalg.solve_triangular(factor, centred.mT, upper=False)
    volume = factor.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)
    return (-0.5 * white.square().sum(1) - volume).T


def read_router(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], tasks: Sequence[str]
) -> Router:
    """The router of which these are ``Router.config`` and ``Router.tensors``.

    Tasks are the model's.

    Raises:
        ValueError, LookupError: what does not fit, in one line.
    """
    settings = RouterSettings.read(config, "router")
    dims, size = tensors["reading.directions"].shape
    own = {"count": (), "mean": (size,), "scatter": (size * (size + 1) // 2,)}
    own["quantiles"] = (QUANTILES,)
    # in the model's order, which the file does not keep
    known = [task for task in tasks if f"tasks.{task}.count" in tensors]
    shapes: dict[str, tuple[int, ...]] = {f"tasks.{t}.{n}": own[n] for t in known for n in own}
    shapes |= {"reading.mean": (dims,), "reading.directions": (dims, size)}
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    check_fit(expected, tensors, "the router")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    if not known:
        raise ValueError("it knows no task")
    reading = Reading(tensors["reading.mean"], tensors["reading.directions"])
    router = Router(reading, settings)
    router.by_task = {t: {n: tensors[f"tasks.{t}.{n}"] for n in own} for t in known}
    return router
