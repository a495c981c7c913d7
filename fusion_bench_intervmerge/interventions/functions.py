"""The forms of an edit: a few named tensors and a formula over them.

A form is a subclass of ``Function``, here or in another package. Defining it registers it: settings
know it by its ``name``, the class's name in lower case unless it has one of its own.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..config import ConfigError, shown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


FUNCTIONS: dict[str, type[Function]] = {}  # every form by name


class ClosedForms(Protocol):
    """What a form may ask for when it is solved instead of trained; ``solving.Regression``.

    Tensors have a leading entry per token position with ``copies``, else a leading 1; k is the
    width. Gains (_, k) are what each further rank takes off the mean squared distance.
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
    ``edit`` so that the same formula serves one task (tensors as stored), one edit per
    token position, and a batch of images of different tasks (tensors gathered per image).

    Arguments are those of ``build_function``; k is the width, r the rank. With ``copies`` the
    tensors have that many leading entries.
    """

    name: ClassVar[str]
    # The formula: vectors z (..., n, width) and its ``terms`` by name -> (..., n, width).
    edit: Callable[..., Tensor]
    takes_activation = False
    identity_start = True
    solvable = False  # whether it has a closed solution, without an activation

    def __init_subclass__(cls) -> None:
        if cls.__name__.startswith("Parametrized"):  # torch derives it from a form with an R
            return
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        FUNCTIONS[cls.name] = cls

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
        """A ConfigError if the form has no such activation or start."""
        if activation not in (None, *ACTIVATIONS):
            raise ConfigError("activation", shown(activation), f"null, {', '.join(ACTIVATIONS)}")
        if activation is not None and not cls.takes_activation:
            raise ConfigError("activation", f"{cls.name} takes none", "null")
        if init not in ("reference", "identity", "regression"):
            raise ConfigError("init", shown(init), "reference, identity, regression")
        if init == "identity" and not cls.identity_start:
            raise ConfigError("init", f"{cls.name} cannot be the identity", "reference")

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        """Create the tensors of the formula at their initial values."""

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        """The formula's tensors at which the edit comes closest to a target, in closed form.

        Forms that are ``solvable`` override this and ``gains``.
        """
        raise TypeError(f"{cls.name} has no closed solution")

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        """(_, number of ranks), what each further rank takes off the mean squared distance."""
        raise TypeError(f"{cls.name} has no closed solution")

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


def linear(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W z + b: z (..., n, k), W (..., r, k), b (..., r) -> (..., n, r)."""
    if weight.dim() == 2:
        return F.linear(z, weight, bias)
    product = z @ weight.mT
    return product if bias is None else product + bias.unsqueeze(-2)


def linear_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """W' x: x (..., n, r), W (..., r, k) -> (..., n, k)."""
    return x @ weight


class NodiReFT(Function):
    """z + W2'(W1 z + b): in the published code, not in the paper's table.

    W1, W2: (r, k), b: (r). An activation acts on W1 z + b. NoReFT, LoReFT and DiReFT are variants
    of this form and fold to it.

    Attributes:
        second: the name of the other matrix; one called R has orthonormal rows.
        subtracts: whether W2 z is taken from W1 z + b.
    """

    takes_activation = True
    solvable = True
    second = "W2"
    subtracts = False

    @classmethod
    def check(cls, activation: str | None, init: str) -> None:
        super().check(activation, init)
        if init == "identity" and activation and cls.second == "R" and cls.subtracts:
            problem = f"{cls.name} with an activation has no identity"
            raise ConfigError("init", problem, "reference")

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        orthonormal = self.second == "R"
        if orthonormal:
            self._register_orthonormal(generator)
        W1, b = self._linear(generator)
        if orthonormal and identity:
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


class NoReFT(NodiReFT):
    """z + W2'(W1 z + b - W2 z), IntervMerge's default (eq 3.4 of the paper).

    W1, W2: (r, k), b: (r). The published code gives both maps a bias and subtracts one from the
    other; a single b is the same class of functions. An activation acts on W1 z + b.
    """

    subtracts = True


class LoReFT(NodiReFT):
    """z + R'(W1 z + b - R z) with orthonormal rows of R (Table 7 of the paper).

    R, W1: (r, k), b: (r). An activation acts on W1 z + b.
    """

    second = "R"
    subtracts = True


class DiReFT(NodiReFT):
    """z + R'(W1 z + b) with orthonormal rows of R (Table 7 of the paper).

    R, W1: (r, k), b: (r). An activation acts on W1 z + b.
    """

    second = "R"


class ConsReFT(Function):
    """z + R'(b - R z): puts a constant b into the rows' span of R (Table 7 of the paper).

    R: (r, k) with orthonormal rows, b: (r). No choice of R and b makes it the identity.
    """

    identity_start = False
    solvable = True

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


class Constant(Function):
    """z + v: what LobiReFT's R'b folds to at inference. v: (k); the rank plays no part."""

    solvable = True

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        # The identity either way: a free vector has no published start.
        self.v = nn.Parameter(self._empty(self.width).zero_())

    def edit(self, z: Tensor, v: Tensor) -> Tensor:
        return z + v.unsqueeze(-2)

    @classmethod
    def solved(cls, forms: ClosedForms, rank: int) -> dict[str, Tensor]:
        return {"v": forms.constant()}

    @classmethod
    def gains(cls, forms: ClosedForms) -> Tensor:
        return forms.constant().square().sum(dim=-1, keepdim=True)


class LobiReFT(Function):
    """z + R'b: adds one vector (Table 7 of the paper; the form of its mini-interventions).

    R: (r, k) with orthonormal rows, b: (r).
    """

    solvable = True

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


class Surgery(Function):
    """z - up relu(down z), Representation Surgery (arXiv 2402.02705, eq 5; 2410.14389 for V2).

    down: (r, k), up: (k, r). It starts at the identity, as published: up is zero.
    """

    def reset_parameters(self, generator: torch.Generator | None, identity: bool) -> None:
        weight, _ = self._linear(generator)
        self.down = nn.Parameter(weight)
        self.up = nn.Parameter(torch.zeros_like(weight).mT.contiguous())

    def edit(self, z: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return z - linear(linear(z, down).relu(), up)


def function_class(name: str) -> type[Function]:
    """The class of a form by name; a ConfigError if no form has it."""
    if name not in FUNCTIONS:
        raise ConfigError(
            "function", f"there is no function {name!r}", ", ".join(sorted(FUNCTIONS))
        )
    return FUNCTIONS[name]


def build_function(
    name: str,
    width: int,
    rank: int,
    *,
    copies: int | None = None,
    activation: str | None = None,
    init: str = "reference",
    generator: torch.Generator | None = None,
) -> Function:
    """One intervention function as a module: z (..., width) -> z (..., width).

    Args:
        name: of a form, one of ``FUNCTIONS``.
        width: number of entries of a vector that it edits.
        rank: number of directions it works along, 1 to width.
        copies: number of independent edits (one per token position); ``None`` for one.
        activation: ``None`` or one of ``ACTIVATIONS``, for the forms that take one.
        init: ``reference`` (the published start) or ``identity`` (starts at z' = z).
        generator: source of the initial values.

    Raises:
        ConfigError: an unknown name, activation or init, a rank out of range, or a start or an
            activation that the form does not have.
    """
    cls = function_class(name)
    if rank not in range(1, width + 1):
        raise ConfigError(
            "rank", f"{rank!r} does not fit vectors of width {width}", f"1 to {width}"
        )
    cls.check(activation, init)
    return cls(width, rank, copies=copies, activation=activation, init=init, generator=generator)
