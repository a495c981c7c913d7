"""The task whose leading directions leave the least of an image over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Kept, Router

DIRECTIONS = 16


class Subspace(Router):
    """-|x - m - V'V(x - m)|, V the leading right singular vectors of a task's centred images."""

    name = "subspace"

    def keep(self, rows: Tensor) -> Kept:
        mean = rows.mean(0)
        _, _, axes = torch.linalg.svd(rows - mean, full_matrices=False)
        return {"mean": mean, "directions": axes[:DIRECTIONS]}

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"mean": (self.components,), "directions": (None, self.components)}

    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        return torch.stack([self._score(of, rows) for of in kept.values()], dim=1)

    def _score(self, kept: Kept, rows: Tensor) -> Tensor:
        moved, axes = rows - kept["mean"], kept["directions"].double()
        return -(moved - moved @ axes.T @ axes).norm(dim=1)
