from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import ClosedForms, Function, linear, linear_transposed
from .nodireft import NodiReFT


class NoReFT(Function):
    """z + W2'(W1 z + b - W2 z), IntervMerge's default (eq 3.4 of the paper).

    W1, W2: (r, k), b: (r). The published code gives both maps a bias and subtracts one from the
    other; a single b is the same class of functions. An activation acts on W1 z + b.
    """

    takes_activation = True

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        weight1, bias = self._linear(generator)
        weight2, _ = self._linear(generator)
        self.W1, self.b = nn.Parameter(weight1), nn.Parameter(bias)
        self.W2 = nn.Parameter(torch.zeros_like(weight2) if identity else weight2)

    def terms(self, W1: Tensor, W2: Tensor, b: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"down": W1 if self.activation else W1 - W2, "W2": W2, "b": b}

    def edit(self, z: Tensor, down: Tensor, W2: Tensor, b: Tensor) -> Tensor:
        inner = self._activate(linear(z, down, b))
        if self.activation:
            inner = inner - linear(z, W2)
        return z + linear_transposed(inner, W2)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        W1, W2, b = forms.affine(rank)
        return {"W1": W1 + W2, "W2": W2, "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.affine_gains()

    def folded(self) -> Function:
        if self.activation is not None:
            return super().folded()
        return self._as(NodiReFT, W1=self.W1 - self.W2, W2=self.W2, b=self.b)
