"""Weighted least squares from sums over rows: what an edit should add, from what it reads.

Notation: rows x are what an edit reads (its part of the site's tensor), rows y are what it should
add to them, each with a weight w. Only sums are kept, so rows may stream; all of them are float64.
With ``groups`` there are that many independent problems (one a token position).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Moments:
    """Weights, means and centred second moments of streamed rows.

    Batches are centred by their own means, multiplied in their own precision and combined in
    float64 (Chan, Golub, LeVeque 1983), since the large means of some entries of CLIP's states
    would otherwise cancel.

    Args:
        width: k, the number of entries of a row.
        groups: how many independent problems.

    Attributes:
        weight: (groups), the sum of the weights.
        mean_x, mean_y: (groups, k).
        xx, xy: (groups, k, k), sums of w (x - mean_x)(x - mean_x)' and w (x - mean_x)(y - mean_y)'.
        yy: (groups), sum of w |y - mean_y|^2.
    """

    def __init__(self, width: int, groups: int = 1, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.weight, self.mean_x, self.mean_y = zeros(), zeros(width), zeros(width)
        self.xx, self.xy, self.yy = zeros(width, width), zeros(width, width), zeros()

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Take in a batch.

        Args:
            x, y: (groups, rows, k), float32 or float64.
            weights: (groups, rows), not negative.
        """
        weights = weights.double()
        total = weights.sum(dim=1)
        scale = weights.sqrt().to(x.dtype).unsqueeze(-1)
        share = (weights / total.clamp_min(1e-300).unsqueeze(1)).to(x.dtype)
        near_x, near_y = (
            share.unsqueeze(1) @ x,
            share.unsqueeze(1) @ y,
        )  # the means, but for rounding
        x, y = (x - near_x) * scale, (y - near_y) * scale
        batch = Moments.__new__(Moments)
        batch.weight = total
        # what rounding left of the first moments
        rest = (scale.mT @ torch.cat([x, y], dim=-1)).double().squeeze(1)
        rest = rest / total.clamp_min(1e-300).unsqueeze(-1)
        rest_x, rest_y = rest.chunk(2, dim=-1)
        batch.mean_x = near_x.squeeze(1).double() + rest_x
        batch.mean_y = near_y.squeeze(1).double() + rest_y
        batch.xx = (x.mT @ x).double() - _outer(rest_x, rest_x, total)
        batch.xy = (x.mT @ y).double() - _outer(rest_x, rest_y, total)
        batch.yy = y.double().square().sum(dim=(1, 2)) - total * rest_y.square().sum(dim=-1)
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Take in the rows that other moments are of."""
        total = self.weight + other.weight
        share = other.weight / total.clamp_min(1e-300)
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.weight * share
        self.xx += other.xx + _outer(step_x, step_x, between)
        self.xy += other.xy + _outer(step_x, step_y, between)
        self.yy += other.yy + between * step_y.square().sum(dim=-1)
        self.mean_x = self.mean_x + share.unsqueeze(-1) * step_x
        self.mean_y = self.mean_y + share.unsqueeze(-1) * step_y
        self.weight = total

    def tensors(self) -> list[Tensor]:
        """All sums, to be sent to other processes."""
        return [self.weight, self.mean_x, self.mean_y, self.xx, self.xy, self.yy]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Moments:
        """The inverse of ``tensors``."""
        moments = cls.__new__(cls)
        (
            moments.weight,
            moments.mean_x,
            moments.mean_y,
            moments.xx,
            moments.xy,
            moments.yy,
        ) = tensors
        return moments


class Regression:
    """Closed-form edits from moments.

    *Affine* edits z -> z + W2'(W1 z + b) of rank r are the reduced-rank regression of y on [x, 1]
    (Izenman 1975, J. Multivariate Anal. 5:248; Reinsel and Velu 1998, chapter 2)::

        B = (Cov(x) + eps I)^-1 Cov(x, y)         ridge, eps = ridge * mean of Cov(x)'s diagonal
        P = the r leading eigenvectors of M = B' Cov(x) B + mean(y) mean(y)'
        W2 = P',   W1 = (B P)',   b = P' mean(y) - W1 mean(x)

    M is the second moment of the fitted values, so its eigenvalues are what each further rank takes
    off the mean squared distance of a row. *Constant* edits z + v have v = mean(y). A *replacement*
    z + R'(b - R z) leaves the distance smaller by the sum of R A R' over the rows of R, where
    A = mean(y) mean(y)' - Cov(x) - Cov(x, y) - Cov(x, y)', so R is A's leading eigenvectors and
    b = R mean(x + y).

    Args:
        moments: of (x, y).
        ridge: as in the formula; 0 for least squares.

    Attributes:
        distance: (groups), the mean |y|^2 of a row, before any edit.
    """

    def __init__(self, moments: Moments, ridge: float = 1e-3):
        self.ridge, self.weight = ridge, moments.weight
        weight = moments.weight.clamp_min(1e-300)
        self.mean_x, self.mean_y = moments.mean_x, moments.mean_y
        self.xx = moments.xx / weight[:, None, None]
        self.xy = moments.xy / weight[:, None, None]
        self.distance = moments.yy / weight + self.mean_y.square().sum(dim=-1)

    def affine(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """W1 (groups, rank, k), W2 (groups, rank, k) with orthonormal rows, b (groups, rank)."""
        directions = self._affine_spectrum[1][..., :rank]
        W1 = (self._slope @ directions).mT
        b = (directions.mT @ self.mean_y.unsqueeze(-1) - W1 @ self.mean_x.unsqueeze(-1)).squeeze(-1)
        return W1, directions.mT.contiguous(), b

    def affine_gains(self) -> Tensor:
        """(groups, k), what each further rank of an affine edit takes off the distance."""
        return self._affine_spectrum[0]

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

    @cached_property
    def _slope(self) -> Tensor:
        diagonal = self.xx.diagonal(dim1=-2, dim2=-1)
        penalty = self.ridge * diagonal.mean(dim=-1)
        left = self.xx + torch.diag_embed(penalty.unsqueeze(-1).expand_as(diagonal))
        factor, failed = torch.linalg.cholesky_ex(left)
        if not failed.any():
            return torch.cholesky_solve(self.xy, factor)
        return torch.linalg.pinv(left, hermitian=True) @ self.xy

    @cached_property
    def _affine_spectrum(self) -> tuple[Tensor, Tensor]:
        slope = self._slope
        return _spectrum(slope.mT @ self.xx @ slope + _outer(self.mean_y, self.mean_y))

    @cached_property
    def _replacement_spectrum(self) -> tuple[Tensor, Tensor]:
        return _spectrum(_outer(self.mean_y, self.mean_y) - self.xx - self.xy - self.xy.mT)


def _outer(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    return product if weight is None else product * weight[:, None, None]


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(-1), vectors.flip(-1)
