"""Gaussians that share a covariance: the linear discriminant."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Kept, Router
from .gaussian import Gaussian, log_density, stacked


class Linear(Router):
    """log N(x; m, S) with one S of all tasks: their scatters' sum, 2% of it a sphere.

    The sum is made when it is used: of a task its own scatter is kept.
    """

    name = "linear"
    keep = Gaussian.keep
    shapes = Gaussian.shapes

    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        count, mean, scatter = stacked(kept, self.components)
        shared = scatter.sum(0) / (count - 1).sum().clamp_min(1)
        sphere = shared.diagonal().mean().clamp_min(1e-12) * torch.eye(self.components)
        factor = torch.linalg.cholesky(0.98 * shared + 0.02 * sphere)
        return log_density(factor[None], rows - mean)
