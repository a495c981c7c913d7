from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Function, linear


class Surgery(Function):
    """z - up relu(down z), Representation Surgery (arXiv 2402.02705, eq 5; 2410.14389 for V2).

    down: (r, k), up: (k, r). It starts at the identity, as published: up is zero.
    """

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        weight, _ = self._linear(generator)
        self.down = nn.Parameter(weight)
        self.up = nn.Parameter(torch.zeros_like(weight).mT.contiguous())

    def edit(self, z: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return z - linear(linear(z, down).relu(), up)
