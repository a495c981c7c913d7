from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import ClosedForms, Function, linear_transposed
from .constant import Constant


class LobiReFT(Function):
    """z + R'b: adds one vector (Table 7 of the paper; the form of its mini-interventions).

    R: (r, k) with orthonormal rows, b: (r).
    """

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        self._register_orthonormal(generator)
        b = self._unit(generator)
        self.b = nn.Parameter(torch.zeros_like(b) if identity else b)

    def edit(self, z: Tensor, R: Tensor, b: Tensor) -> Tensor:
        return z + linear_transposed(b.unsqueeze(-2), R)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        v = forms.constant()
        # One row points along v, the others are any that complete it.
        basis = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device).expand(len(v), -1, -1)
        q, r = torch.linalg.qr(torch.cat([v.unsqueeze(-1), basis], dim=-1)[..., : v.shape[-1]])
        b = torch.zeros(len(v), rank, dtype=v.dtype, device=v.device)
        b[:, 0] = r[:, 0, 0]
        return {"R": q[..., :rank].mT.contiguous(), "b": b}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.constant().square().sum(dim=-1, keepdim=True)

    def folded(self) -> Function:
        return self._as(Constant, v=linear_transposed(self.b.unsqueeze(-2), self.R).squeeze(-2))
