from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .base import ClosedForms, Function, linear, linear_transposed
from .nodireft import NodiReFT


class LoReFT(Function):
    """z + R'(W1 z + b - R z) with orthonormal rows of R (Table 7 of the paper).

    R, W1: (r, k), b: (r). An activation acts on W1 z + b.
    """

    takes_activation = True

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        if identity and self.activation is not None:
            raise ConfigError("init", "loreft with an activation has no identity", "reference")
        self._register_orthonormal(generator)
        weight, bias = self._linear(generator)
        if identity:
            weight, bias = self.R.detach().clone(), torch.zeros_like(bias)
        self.W1, self.b = nn.Parameter(weight), nn.Parameter(bias)

    def terms(self, R: Tensor, W1: Tensor, b: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"down": W1 if self.activation else W1 - R, "R": R, "b": b}

    def edit(self, z: Tensor, down: Tensor, R: Tensor, b: Tensor) -> Tensor:
        inner = self._activate(linear(z, down, b))
        if self.activation:
            inner = inner - linear(z, R)
        return z + linear_transposed(inner, R)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        W1, W2, b = forms.affine(rank)
        return {"R": W2, "W1": W1 + W2, "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.affine_gains()

    def folded(self) -> Function:
        if self.activation is not None:
            return super().folded()
        return self._as(NodiReFT, W1=self.W1 - self.R, W2=self.R, b=self.b)
