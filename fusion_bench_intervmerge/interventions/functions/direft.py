from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import ClosedForms, Function, linear, linear_transposed
from .nodireft import NodiReFT


class DiReFT(Function):
    """z + R'(W1 z + b) with orthonormal rows of R (Table 7 of the paper).

    R, W1: (r, k), b: (r). An activation acts on W1 z + b.
    """

    takes_activation = True

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        self._register_orthonormal(generator)
        weight, bias = self._linear(generator)
        self.W1 = nn.Parameter(torch.zeros_like(weight) if identity else weight)
        self.b = nn.Parameter(torch.zeros_like(bias) if identity else bias)

    def edit(self, z: Tensor, R: Tensor, W1: Tensor, b: Tensor) -> Tensor:
        return z + linear_transposed(self._activate(linear(z, W1, b)), R)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        W1, W2, b = forms.affine(rank)
        return {"R": W2, "W1": W1, "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.affine_gains()

    def folded(self) -> Function:
        return self._as(NodiReFT, W1=self.W1, W2=self.R, b=self.b)
