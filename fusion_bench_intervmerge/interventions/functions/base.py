"""What every intervention function is: a few named tensors and a formula over them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ...errors import ConfigError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class ClosedForms(Protocol):
    """What a form may ask for when it is solved instead of trained; ``solving.Regression``.

    Tensors have a leading entry a token position with ``copies``, else a leading 1; k is the width.
    Gains (_, k) are what each further rank takes off the mean squared distance.
    """

    def affine(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best z + W2'(W1 z + b): W1, W2 (_, rank, k), b (_, rank); W2 has orthonormal rows."""

    def affine_gains(self) -> Tensor: ...

    def constant(self) -> Tensor:
        """The best z + v: (_, k)."""

    def replacement(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best z + R'(b - R z): R (_, rank, k) with orthonormal rows, b (_, rank)."""

    def replacement_gains(self) -> Tensor: ...


class Orthonormal(nn.Module):
    """Keeps the rows of R orthonormal while any optimizer moves them.

    R = L^-1 X with L L' = X X' (Cholesky QR): the rows of R span the rows of X. An X that is
    orthonormal already is returned unchanged but for rounding. An X whose rows do not span r
    directions (zero or equal rows) has no such R and is returned as it is. torch's ``orthogonal``
    parametrization is not used: it keeps a second tensor of the size of R from the start, and
    training leaves a loaded R only through a QR that may flip its signs.

    Attributes:
        loaded: R as a file had it. While X equals it, R is X to the bit, so that a model that was
            saved and loaded computes what it computed before.
    """

    loaded: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loaded", None, persistent=False)

    def forward(self, X: Tensor) -> Tensor:
        wide = X.to(torch.promote_types(X.dtype, torch.float32))
        gram = wide @ wide.mT
        dependent = self._dependent(gram.detach())
        # The gradient of a failed factorisation is not a number, even where nothing depends on it.
        gram = torch.where(dependent, torch.eye(gram.shape[-1]).to(gram), gram)
        factor, _ = torch.linalg.cholesky_ex(gram)
        rows = torch.linalg.solve_triangular(factor, wide, upper=False).to(X.dtype)
        rows = torch.where(dependent, X, rows)
        if self.loaded is None:
            return rows
        # the value is X, the gradient that of the rows
        as_loaded = X.detach() - (rows.detach() - rows)
        return torch.where((self.loaded == X).all(), as_loaded, rows)

    @staticmethod
    def _dependent(gram: Tensor) -> Tensor:
        """Whether a row lies within rounding of the others' span: (..., 1, 1)."""
        # cholesky_ex does not make a GPU wait to look for failure
        factor, failed = torch.linalg.cholesky_ex(gram)
        lengths = gram.diagonal(dim1=-2, dim2=-1)
        left = factor.diagonal(dim1=-2, dim2=-1).square()
        lost = left < 10 * torch.finfo(gram.dtype).eps * lengths
        return ((failed != 0) | lost.any(dim=-1))[..., None, None]

    def right_inverse(self, R: Tensor) -> Tensor:
        return R.clone()  # torch stores the returned tensor, not a copy of it


class Function(nn.Module, ABC):
    """An edit z -> z' of vectors of one width.

    A subclass gives its formula in its docstring, creates its tensors in ``reset_parameters``
    and applies them (or sums of them, see ``terms``) in ``edit``. The tensors are arguments of
    ``edit`` so that the same formula serves one task (tensors as stored), one edit a token
    position, and a batch of images of different tasks (tensors gathered per image).

    Args:
        width: k, the number of entries of a vector that the function sees.
        rank: r, the number of directions it works along.
        copies: how many independent edits live in one module (one a token position);
            their tensors have this many leading entries. ``None`` for a single one.
        activation: name from ``ACTIVATIONS`` applied between down and up, where the form has one.
        init: ``reference`` draws the published initial values, ``identity`` starts at z' = z.
        generator: source of the initial values; the global one when ``None``.
    """

    name: str
    # The formula: vectors z (..., n, width) and its ``terms`` by name -> (..., n, width).
    edit: Callable[..., Tensor]
    takes_activation = False
    identity_start = True

    def __init_subclass__(cls) -> None:
        # The class that torch derives from a form with an orthonormal R keeps the form's name.
        if "name" not in vars(cls) and not is_parametrized(cls):
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

    @classmethod
    def check(cls, activation: str | None, init: str) -> None:
        """Make sure that the form has an activation and a start like these.

        Raises:
            ConfigError: it has not.
        """
        if activation is not None and not cls.takes_activation:
            raise ConfigError("activation", f"{cls.name} takes none", "null")
        if init == "identity" and not cls.identity_start:
            raise ConfigError("init", f"{cls.name} cannot be the identity", "reference")

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        """Create the tensors of the formula at their initial values."""

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        """The formula's tensors at which the edit comes closest to a target, in closed form.

        Forms that have a solution override this and ``gains``.
        """
        raise TypeError(f"{cls.name} has no closed solution")

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        """(_, number of ranks), what each further rank takes off the mean squared distance."""
        raise TypeError(f"{cls.name} has no closed solution")

    @classmethod
    def is_solvable(cls) -> bool:
        """Whether the form has a closed solution (without an activation)."""
        return cls.solved.__func__ is not Function.solved.__func__  # type: ignore[attr-defined]

    def folded(self) -> Function:
        """An equal function that needs least at inference: the same outputs within rounding."""
        return copy.deepcopy(self)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the formula by name; R as its orthonormal value."""
        names = [*self._parameters, *getattr(self, "parametrizations", {})]
        return {name: getattr(self, name) for name in names}

    def terms(self, **tensors: Tensor) -> dict[str, Tensor]:
        """What ``edit`` takes: the tensors of the formula, or sums of them.

        Sums are formed here, in the tensors' own type: rounded to that of the vectors first, two
        tensors that are almost equal would leave little but their rounding.
        """
        return tensors

    def prepared(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The ``terms`` of these tensors, for vectors of a type."""
        return {name: term.to(dtype) for name, term in self.terms(**tensors).items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of the formula, as ``tensors`` names them."""
        for name, tensor in tensors.items():
            if parametrize.is_parametrized(self, name):
                held = self.get_submodule(f"parametrizations.{name}")
                X, orthonormal = held.get_parameter("original"), held.get_submodule("0")
                X.copy_(tensor)
                orthonormal.loaded = X.clone()
            else:
                getattr(self, name).copy_(tensor)

    def forward(self, z: Tensor) -> Tensor:
        """The edited vectors, in z's shape (..., width) and dtype; with ``copies``, z is
        (..., copies, width).
        """
        tensors = self.prepared(self.tensors(), z.dtype)
        if self.copies is None:
            return self.edit(z, **tensors)
        return self.edit(z.unsqueeze(-2), **tensors).squeeze(-2)

    def extra_repr(self) -> str:
        return f"{self.name}, width={self.width}, rank={self.rank}"

    # -- for the forms ---------------------------------------------------------------------------

    def _as(self, form: type[Function], **tensors: Tensor) -> Function:
        """Another form over given tensors."""
        with torch.device("meta"):  # no starting values are drawn, from anybody's random numbers
            function = form(self.width, self.rank, copies=self.copies, activation=self.activation)
        copies = {name: t.detach().clone() for name, t in tensors.items()}
        function.load_state_dict(copies, assign=True)
        return function

    def _activate(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x) if self.activation else x

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*([] if self.copies is None else [self.copies]), *shape)

    def _uniform(self, *shape: int, bound: float, generator: torch.Generator | None) -> Tensor:
        return self._empty(*shape).uniform_(-bound, bound, generator=generator)

    def _linear(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Weight (r, k) and bias (r) as ``nn.Linear(k, r)`` draws them."""
        bound = 1 / math.sqrt(self.width)
        weight = self._uniform(self.rank, self.width, bound=bound, generator=generator)
        return weight, self._uniform(self.rank, bound=bound, generator=generator)

    def _unit(self, generator: torch.Generator | None) -> Tensor:
        """b (r) in [0, 1), as published."""
        return self._uniform(self.rank, bound=0.5, generator=generator) + 0.5

    def _register_orthonormal(self, generator: torch.Generator | None) -> None:
        """R (r, k): rows of a random rotation, uniform over all of them."""
        gaussian = self._empty(self.width, self.rank).normal_(generator=generator)
        q, r = torch.linalg.qr(gaussian)
        signs = r.diagonal(dim1=-2, dim2=-1).sign()
        self.R = nn.Parameter((q * signs.unsqueeze(-2)).mT.contiguous())
        parametrize.register_parametrization(self, "R", Orthonormal())


def is_parametrized(cls: type) -> bool:
    """Whether torch derived the class from a form with an orthonormal R."""
    return cls.__name__.startswith("Parametrized")


def linear(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W z + b: z (..., n, k), W (..., r, k), b (..., r) -> (..., n, r)."""
    if weight.dim() == 2:
        return F.linear(z, weight, bias)
    product = z @ weight.mT
    return product if bias is None else product + bias.unsqueeze(-2)


def linear_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """W' x: x (..., n, r), W (..., r, k) -> (..., n, k)."""
    return x @ weight
