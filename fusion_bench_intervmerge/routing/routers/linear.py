"""Gaussians that share a covariance: the linear discriminant."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Kept, Router
from .gaussian import Gaussian, full, log_density


class Linear(Router):
    """log N(x; m, S) with one S of all tasks: their scatters' sum, 2% of it a sphere.

    The sum is made when it is used: of a task its own scatter is kept.
    """

    name = "linear"
    keep = Gaussian.keep
    shapes = Gaussian.shapes

    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        size = self.components
        scatter = sum(full(of["scatter"].double(), size) for of in kept.values())
        images = sum(of["count"].double() - 1 for of in kept.values())
        shared = torch.as_tensor(scatter) / torch.as_tensor(images).clamp_min(1)
        sphere = shared.diagonal().mean().clamp_min(1e-12) * torch.eye(size, dtype=torch.float64)
        factor = torch.linalg.cholesky(0.98 * shared + 0.02 * sphere)
        return torch.stack([log_density(factor, rows - of["mean"]) for of in kept.values()], dim=1)
