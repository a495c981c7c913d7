from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import ClosedForms, Function, linear, linear_transposed


class ConsReFT(Function):
    """z + R'(b - R z): puts a constant b into the rows' span of R (Table 7 of the paper).

    R: (r, k) with orthonormal rows, b: (r). No choice of R and b makes it the identity.
    """

    identity_start = False

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        self._register_orthonormal(generator)
        self.b = nn.Parameter(self._unit(generator))

    def edit(self, z: Tensor, R: Tensor, b: Tensor) -> Tensor:
        return z + linear_transposed(b.unsqueeze(-2) - linear(z, R), R)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        R, b = forms.replacement(rank)
        return {"R": R, "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.replacement_gains()
