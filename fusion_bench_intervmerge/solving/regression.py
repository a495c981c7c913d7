"""Weighted least squares from sums over rows: what an edit should add, from what it reads.

Notation: rows x are what an edit reads (its part of the site's tensor), rows y are what it should
add to them, each with a weight w. Only sums are kept, so rows may stream; all of them are float64.
With ``groups`` there are that many independent problems (one a token position).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RIDGES = tuple(10 ** (exponent / 4) for exponent in range(-20, 9))  # 1e-5 to 100
TINY, EPSILON = 1e-300, torch.finfo(torch.float64).eps


@dataclass
class Moments:
    """Weights, means and centred second moments of rows.

    Batches are centred by their own means, multiplied in their own precision and combined in
    float64 (Chan, Golub, LeVeque 1983), since the large means of some entries of CLIP's states
    would otherwise cancel.

    Attributes:
        count: (groups), the number of rows with a weight.
        weight: (groups), the sum of the weights.
        mean_x, mean_y: (groups, k).
        xx, xy: (groups, k, k), sums of w (x - mean_x)(x - mean_x)' and w (x - mean_x)(y - mean_y)'.
        yy: (groups), sum of w |y - mean_y|^2.
    """

    count: Tensor
    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def none(cls, width: int, groups: int = 1, device: torch.device | str = "cpu") -> Moments:
        """Of no rows yet."""
        vector = torch.zeros(groups, width, dtype=torch.float64, device=device)
        matrix = vector.new_zeros(groups, width, width)
        number = vector.new_zeros(groups)
        return cls(number, number, vector, vector, matrix, matrix.clone(), number.clone())

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weights: Tensor) -> Moments:
        """Of a batch of rows.

        Args:
            x, y: (groups, rows, k), float32 or float64.
            weights: (groups, rows), not negative.
        """
        weights = weights.double()
        weight = weights.sum(dim=1)
        share = (weights / weight.clamp_min(TINY).unsqueeze(1)).unsqueeze(1).to(x.dtype)
        mean_x, mean_y = share @ x, share @ y  # but for rounding, which is made up for below
        root = weights.sqrt().to(x.dtype).unsqueeze(-1)
        x, y = (x - mean_x) * root, (y - mean_y) * root
        rest = (root.mT @ torch.cat([x, y], dim=-1)).double().squeeze(1)
        rest_x, rest_y = (rest / weight.clamp_min(TINY).unsqueeze(-1)).chunk(2, dim=-1)
        return cls(
            count=weights.count_nonzero(dim=1).double(),
            weight=weight,
            mean_x=mean_x.squeeze(1).double() + rest_x,
            mean_y=mean_y.squeeze(1).double() + rest_y,
            xx=(x.mT @ x).double() - _outer(rest_x, rest_x, weight),
            xy=(x.mT @ y).double() - _outer(rest_x, rest_y, weight),
            yy=y.double().square().sum(dim=(1, 2)) - weight * rest_y.square().sum(dim=-1),
        )

    def merge(self, other: Moments) -> None:
        """Take in the rows that other moments are of."""
        total = self.weight + other.weight
        share = other.weight / total.clamp_min(TINY)
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.weight * share
        self.xx += other.xx + _outer(step_x, step_x, between)
        self.xy += other.xy + _outer(step_x, step_y, between)
        self.yy += other.yy + between * step_y.square().sum(dim=-1)
        self.mean_x = self.mean_x + share.unsqueeze(-1) * step_x
        self.mean_y = self.mean_y + share.unsqueeze(-1) * step_y
        self.count, self.weight = self.count + other.count, total


class Regression:
    """Closed-form edits from moments.

    *Affine* edits z -> z + W2'(W1 z + b) of rank r are the reduced-rank regression of y on [x, 1]
    (Izenman 1975, J. Multivariate Anal. 5:248; Reinsel and Velu 1998, chapter 2)::

        B = (Cov(x) + eps I)^-1 Cov(x, y)         eps = ridge * mean of Cov(x)'s diagonal
        P = the r leading eigenvectors of M = B' Cov(x) B + mean(y) mean(y)'
        W2 = P',   W1 = (B P)',   b = P' mean(y) - W1 mean(x)

    M is the second moment of the fitted values, so its eigenvalues are what each further rank takes
    off the mean squared distance of a row. *Constant* edits z + v have v = mean(y). A *replacement*
    z + R'(b - R z) leaves the distance smaller by the sum of R A R' over the rows of R, where
    A = mean(y) mean(y)' - Cov(x) - Cov(x, y) - Cov(x, y)', so R is A's leading eigenvectors and
    b = R mean(x + y).

    Without a ridge given, each problem takes the one of ``RIDGES`` with the least generalised
    cross-validation (Golub, Heath, Wahba 1979, Technometrics 21:215), for n rows::

        |y - B'x|^2 / (1 - df / n)^2,      df = 1 + sum of v / (v + eps) over Cov(x)'s eigenvalues v

    so that few images give a cautious edit and many a close one.

    Args:
        moments: of (x, y).
        ridge: as in the formula; 0 for least squares, None for cross-validation.
    """

    def __init__(self, moments: Moments, ridge: float | None = None):
        self._ridge, self._count = ridge, moments.count
        weight = moments.weight.clamp_min(TINY)
        self.mean_x, self.mean_y = moments.mean_x, moments.mean_y
        self._xx = moments.xx / weight[:, None, None]
        self._xy = moments.xy / weight[:, None, None]
        self._yy = moments.yy / weight

    def affine(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """W1 (groups, rank, k), W2 (groups, rank, k) with orthonormal rows, b (groups, rank)."""
        directions = self._affine[1][..., :rank]
        W1 = self.slope_along(directions).mT
        b = (directions.mT @ self.mean_y.unsqueeze(-1) - W1 @ self.mean_x.unsqueeze(-1)).squeeze(-1)
        return W1, directions.mT.contiguous(), b

    def affine_gains(self) -> Tensor:
        """(groups, k), what each further rank of an affine edit takes off the distance."""
        return self._affine[0]

    def constant(self) -> Tensor:
        """v (groups, k)."""
        return self.mean_y

    def replacement(self, rank: int) -> tuple[Tensor, Tensor]:
        """R (groups, rank, k) with orthonormal rows, b (groups, rank)."""
        rows = self._replacement_spectrum[1][..., :rank].mT.contiguous()
        return rows, (rows @ (self.mean_x + self.mean_y).unsqueeze(-1)).squeeze(-1)

    def replacement_gains(self) -> Tensor:
        """(groups, k), as ``affine_gains``; negative where a direction is better left alone."""
        return self._replacement_spectrum[0]

    def slope_along(self, directions: Tensor) -> Tensor:
        """B P for directions P (groups, k, any)."""
        _, vectors, turned, inverse = self._ridge_solution
        return vectors @ (inverse.unsqueeze(-1) * (turned @ directions))

    @cached_property
    def _ridge_solution(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues v and vectors V of Cov(x), V' Cov(x, y), and 1 / (v + eps)."""
        values, vectors = torch.linalg.eigh(self._xx)
        values = values.clamp_min(0)
        turned = vectors.mT @ self._xy
        scale = values.mean(dim=-1, keepdim=True)
        if self._ridge is None:
            penalty = scale * self._best_ridge(values, turned, scale).unsqueeze(-1)
        else:
            penalty = scale * self._ridge
        # without a penalty, directions in which x does not vary take no part
        kept = values + penalty > values.shape[-1] * EPSILON * values[..., -1:]
        inverse = torch.where(kept, 1 / (values + penalty).clamp_min(TINY), 0.0)
        return values, vectors, turned, inverse

    def _best_ridge(self, values: Tensor, turned: Tensor, scale: Tensor) -> Tensor:
        """(groups), by generalised cross-validation."""
        ridges = torch.tensor(RIDGES, dtype=values.dtype, device=values.device)
        penalties = (scale * ridges).unsqueeze(-1)  # (groups, ridges, 1)
        values, power = values.unsqueeze(1), turned.square().sum(dim=-1).unsqueeze(1)
        shrunk = (values + penalties).clamp_min(TINY)
        explained = (power * (values + 2 * penalties) / shrunk.square()).sum(dim=-1)
        left = 1 - ((values / shrunk).sum(dim=-1) + 1) / self._count.clamp_min(1).unsqueeze(-1)
        scores = (self._yy.unsqueeze(-1) - explained).clamp_min(0) / left.square()
        # as many degrees of freedom as rows fit anything
        scores = torch.where(left > 1e-3, scores, torch.inf)
        return ridges[scores.flip(-1).argmin(dim=-1).neg() - 1]  # the largest of equals

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        values, _, turned, inverse = self._ridge_solution
        weighted = (values * inverse.square()).unsqueeze(-1) * turned
        return _spectrum(turned.mT @ weighted + _outer(self.mean_y, self.mean_y))

    @cached_property
    def _replacement_spectrum(self) -> tuple[Tensor, Tensor]:
        return _spectrum(_outer(self.mean_y, self.mean_y) - self._xx - self._xy - self._xy.mT)


def _outer(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    return product if weight is None else product * weight[:, None, None]


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(-1), vectors.flip(-1)
