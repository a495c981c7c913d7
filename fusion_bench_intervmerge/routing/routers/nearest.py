"""The task of the nearest image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Kept, Router


class Nearest(Router):
    """-min |x - x_i| over the images x_i of a task, all of which are kept."""

    name = "nearest"

    def keep(self, rows: Tensor) -> Kept:
        return {"rows": rows}

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"rows": (None, self.components)}

    def scores(self, kept: Mapping[str, Kept], rows: Tensor) -> Tensor:
        distances = [torch.cdist(rows, of["rows"].double()).amin(1) for of in kept.values()]
        return -torch.stack(distances, dim=1)
