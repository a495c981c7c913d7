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
        return torch.stack([self._likelihood(of, rows) for of in kept.values()], dim=1)

    def _likelihood(self, kept: Kept, rows: Tensor) -> Tensor:
        count = kept["count"].double()
        scatter = full(kept["scatter"].double(), self.components)
        variance = scatter.diagonal().mean() / (count - 1).clamp_min(1)
        sphere = PRIOR * variance.clamp_min(1e-12) * torch.eye(len(scatter), dtype=torch.float64)
        factor = torch.linalg.cholesky((scatter + sphere) / (count - 1 + PRIOR))
        return log_density(factor, rows - kept["mean"])


def full(triangle: Tensor, size: int) -> Tensor:
    """A symmetric matrix from its lower triangle."""
    matrix = triangle.new_zeros(size, size)
    row, column = torch.tril_indices(size, size)
    matrix[row, column] = triangle
    matrix[column, row] = triangle
    return matrix


def log_density(factor: Tensor, moved: Tensor) -> Tensor:
    """log N(x; 0, L L') but for a constant: L (size, size), x (images, size) -> (images,)."""
    white = torch.linalg.solve_triangular(factor, moved.T, upper=False)
    return -0.5 * white.square().sum(0) - factor.diagonal().log().sum()
