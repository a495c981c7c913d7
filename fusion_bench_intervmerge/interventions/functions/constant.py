from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import ClosedForms, Function


class Constant(Function):
    """z + v: what LobiReFT's R'b folds to at inference. v: (k); the rank plays no part."""

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        # The identity either way: a free vector has no published start.
        drawn = self._uniform(self.width, bound=1, generator=generator)
        self.v = nn.Parameter(torch.zeros_like(drawn))

    def edit(self, z: Tensor, v: Tensor) -> Tensor:
        return z + v.unsqueeze(-2)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        return {"v": forms.constant()}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.constant().square().sum(dim=-1, keepdim=True)
