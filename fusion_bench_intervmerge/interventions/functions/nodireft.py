from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import ClosedForms, Function, linear, linear_transposed


class NodiReFT(Function):
    """z + W2'(W1 z + b): in the published code, not in the paper's table.

    W1, W2: (r, k), b: (r). An activation acts on W1 z + b. NoReFT, LoReFT and DiReFT fold to it.
    """

    takes_activation = True

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        weight1, bias = self._linear(generator)
        weight2, _ = self._linear(generator)
        self.W1, self.b = nn.Parameter(weight1), nn.Parameter(bias)
        self.W2 = nn.Parameter(torch.zeros_like(weight2) if identity else weight2)

    def edit(self, z: Tensor, W1: Tensor, W2: Tensor, b: Tensor) -> Tensor:
        return z + linear_transposed(self._activate(linear(z, W1, b)), W2)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        W1, W2, b = forms.affine(rank)
        return {"W1": W1, "W2": W2, "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.affine_gains()
