"""A Gaussian a task, with a covariance of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Kept, Router

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
