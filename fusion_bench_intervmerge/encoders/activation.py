"""CLIP's activation function, with a backward pass of one kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F

SLOPE = 1.702


class FusedQuickGELU(nn.Module):
    """x * sigmoid(1.702 x), elementwise (section 2 of arXiv 1606.08415).

    Written as silu(1.702 x) / 1.702, so that its derivative is silu'(1.702 x), which torch has one
    kernel for; autograd alone would make five passes over the widest tensors of the encoder.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        scaled = SLOPE * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(SLOPE)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, scaled)
