from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .base import ClosedForms, Function, linear, linear_transposed


class NodiReFT(Function):
    """z + W2'(W1 z + b): in the published code, not in the paper's table.

    W1, W2: (r, k), b: (r). An activation acts on W1 z + b. NoReFT, LoReFT and DiReFT are variants
    of this form and fold to it.

    Attributes:
        second: the name of the other matrix; one called R has orthonormal rows.
        subtracts: whether W2 z is taken from W1 z + b.
    """

    takes_activation = True
    second = "W2"
    subtracts = False

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        orthonormal = self.second == "R"
        if orthonormal:
            self._register_orthonormal(generator)
        W1, b = self._linear(generator)
        if orthonormal and identity:
            if self.subtracts and self.activation:
                problem = f"{self.name} with an activation has no identity"
                raise ConfigError("init", problem, "reference")
            W1 = self.R.detach().clone() if self.subtracts else torch.zeros_like(W1)
            b = torch.zeros_like(b)
        self.W1, self.b = nn.Parameter(W1), nn.Parameter(b)
        if not orthonormal:
            W2, _ = self._linear(generator)
            self.W2 = nn.Parameter(torch.zeros_like(W2) if identity else W2)

    def terms(self, **tensors: Tensor) -> dict[str, Tensor]:
        down, up = tensors["W1"], tensors[self.second]
        if self.subtracts and not self.activation:
            down = down - up
        return {"down": down, "up": up, "b": tensors["b"]}

    def edit(self, z: Tensor, down: Tensor, up: Tensor, b: Tensor) -> Tensor:
        inner = self._activate(linear(z, down, b))
        if self.subtracts and self.activation:
            inner = inner - linear(z, up)
        return z + linear_transposed(inner, up)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        W1, W2, b = forms.affine(rank)
        return {"W1": W1 + W2 if cls.subtracts else W1, cls.second: W2, "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.affine_gains()

    def folded(self) -> Function:
        if type(self) is NodiReFT or (self.subtracts and self.activation):
            return super().folded()
        terms = self.terms(**self.tensors())
        return self._as(NodiReFT, W1=terms["down"], W2=terms["up"], b=terms["b"])
