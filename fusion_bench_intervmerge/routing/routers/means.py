"""The task whose mean lies in the same direction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import Kept, Router


class Means(Router):
    """cos(x, m), both seen from the middle of all images of the first fit."""

    name = "means"

    def keep(self, rows: Tensor) -> Kept:
        return {"mean": rows.mean(0)}

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"mean": (self.components,)}

    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        means = torch.stack([of["mean"].double() for of in kept.values()])
        return normalize(rows, dim=1) @ normalize(means, dim=1).T
