"""What every intervention function is: a few named tensors and a formula over them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Orthonormal(nn.Module):
    """Keeps the rows of R orthonormal while any optimizer moves them.

    R = L^-1 X with L L' = X X' (Cholesky QR): the rows of R span the rows of X. An X that is
    orthonormal already comes back as it is but for rounding. torch's own ``orthogonal``
    parametrization was not taken because it keeps a second tensor of the size of R from the start
    and leaves a loaded R only through a QR that may flip its signs.

    Attributes:
        loaded: R as a file had it. Until X moves away from it, R is this to the bit, so that a
            model that was saved and loaded computes what it computed before.
    """

    loaded: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loaded", None, persistent=False)

    def forward(self, X: Tensor) -> Tensor:
        # cholesky_ex does not make a GPU wait to look for failure. Rows that span nothing
        # (R = 0, "no direction") stay as they are.
        wide = X.to(torch.promote_types(X.dtype, torch.float32))
        factor, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
        rows = torch.linalg.solve_triangular(factor, wide, upper=False).to(X.dtype)
        rows = torch.where((failed != 0)[..., None, None], X, rows)
        if self.loaded is None:
            return rows
        # the value is X, the gradient that of the rows
        as_loaded = X.detach() - (rows.detach() - rows)
        return torch.where((self.loaded == X).all(), as_loaded, rows)

    def right_inverse(self, R: Tensor) -> Tensor:
        return R.clone()  # torch stores what comes back, not a copy of it


class Function(nn.Module, ABC):
    """An edit z -> z' of vectors of one width.

    A subclass names its formula in its docstring, creates its tensors in ``reset_parameters``
    and applies them in ``edit``. The tensors are arguments of ``edit`` so that the same formula
    serves one task (tensors as stored), one edit a token position, and a batch of images of
    different tasks (tensors gathered per image).

    Args:
        width: k, the number of entries of a vector that the function sees.
        rank: r, the number of directions it works along.
        copies: how many independent edits live in one module (one a token position);
            their tensors carry this many leading entries. ``None`` for a single one.
        activation: name from ``ACTIVATIONS`` applied between down and up, where the form has one.
        init: ``reference`` draws the published initial values, ``identity`` starts at z' = z.
        generator: source of the initial values; the global one when ``None``.
    """

    name: str
    # The formula: vectors z (..., n, width) and its tensors by name -> (..., n, width).
    edit: Callable[..., Tensor]
    takes_activation = False
    identity_start = True

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "name"):  # torch derives a class of its own from a parametrized form
            cls.name = cls.__module__.rpartition(".")[2]

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        copies: int | None = None,
        activation: str | None = None,
        init: str = "reference",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.width, self.rank, self.copies = width, rank, copies
        self.activation = activation
        self.reset_parameters(generator, identity=init == "identity")

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        """Create the tensors of the formula at their initial values."""

    def folded(self) -> Function:
        """An equal function that needs least at inference: the same outputs within rounding."""
        return copy.deepcopy(self)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the formula by name; R as its orthonormal value."""
        names = [*self._parameters, *getattr(self, "parametrizations", {})]
        return {name: getattr(self, name) for name in names}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of the formula, as ``tensors`` names them."""
        parametrized: Any = getattr(self, "parametrizations", {})
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in parametrized:
                    parametrized[name].original.copy_(tensor)
                    parametrized[name][0].loaded = parametrized[name].original.clone()
                else:
                    getattr(self, name).copy_(tensor)

    def forward(self, z: Tensor) -> Tensor:
        """Apply the edit.

        Args:
            z: (..., width); with ``copies``, (..., copies, width).

        Returns:
            The edited vectors, in z's shape and dtype.
        """
        tensors = {name: tensor.to(z.dtype) for name, tensor in self.tensors().items()}
        if self.copies is None:
            return self.edit(z, **tensors)
        return self.edit(z.unsqueeze(-2), **tensors).squeeze(-2)

    def extra_repr(self) -> str:
        return f"{self.name}, width={self.width}, rank={self.rank}"

    # -- for the forms ---------------------------------------------------------------------------

    def _as(self, form: type[Function], **tensors: Tensor) -> Function:
        """Another form over given tensors."""
        function = form(self.width, self.rank, copies=self.copies, activation=self.activation)
        copies = {name: t.detach().clone() for name, t in tensors.items()}
        function.load_state_dict(copies, assign=True)
        return function

    def _activate(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x) if self.activation else x

    def _uniform(self, *shape: int, bound: float, generator: torch.Generator | None) -> Tensor:
        leading = () if self.copies is None else (self.copies,)
        return torch.empty(*leading, *shape).uniform_(-bound, bound, generator=generator)

    def _linear(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Weight (r, k) and bias (r) as ``nn.Linear(k, r)`` draws them."""
        bound = 1 / math.sqrt(self.width)
        weight = self._uniform(self.rank, self.width, bound=bound, generator=generator)
        return weight, self._uniform(self.rank, bound=bound, generator=generator)

    def _register_orthonormal(self, generator: torch.Generator | None) -> None:
        """R (r, k): rows of a random rotation, uniform over all of them."""
        leading = () if self.copies is None else (self.copies,)
        gaussian = torch.randn(*leading, self.width, self.rank, generator=generator)
        q, r = torch.linalg.qr(gaussian)
        signs = r.diagonal(dim1=-2, dim2=-1).sign()
        self.R = nn.Parameter((q * signs.unsqueeze(-2)).mT.contiguous())
        parametrize.register_parametrization(self, "R", Orthonormal())


def linear(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W z + b: z (..., n, k), W (..., r, k), b (..., r) -> (..., n, r)."""
    if weight.dim() == 2:
        return F.linear(z, weight, bias)
    product = z @ weight.mT
    return product if bias is None else product + bias.unsqueeze(-2)


def linear_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """W' x: x (..., n, r), W (..., r, k) -> (..., n, k)."""
    return x @ weight
