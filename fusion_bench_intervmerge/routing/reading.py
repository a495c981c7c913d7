"""What a router reads: for each image, a few numbers of the states that no edit reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

# A number that moves less than this share of most others is a constant and its rounding.
_CONSTANT = 1e-3


def rows_of(prefix: Tensor, num_tokens: int, prefix_tokens: int = 1) -> Tensor:
    """One row an image, from what a ``Prefix`` keeps.

    Mean, standard deviation, largest and smallest value over the patch tokens, behind the class
    token as it is (and its self-attention output, where that is common to all tasks).

    Args:
        prefix: image features (batch, projection_dim), or tokens (batch, any, width).
        num_tokens, prefix_tokens: of the encoder, and how many of them stand before the patches.

    Returns:
        (batch, dims), float64, on the CPU.
    """
    states = prefix.detach().float()
    if states.ndim == 2:
        return states.double().cpu()
    # the last block's prefix has no patch tokens, the others one or two vectors before them
    before = 2 if states.shape[1] == 2 else states.shape[1] - (num_tokens - prefix_tokens)
    first, patches = states[:, :before].flatten(1), states[:, before:]
    if patches.shape[1]:
        mean = patches.mean(1)
        # torch's own std takes a hundred times as long over a dimension in the middle
        deviation = (patches - mean[:, None]).square().mean(1).sqrt()
        first = torch.cat([first, mean, deviation, patches.amax(1), patches.amin(1)], dim=1)
    return first.double().cpu()


@dataclass
class Reading:
    """Rows -> their leading principal components, each number in units of its own deviation.

    It is made once, of the images that the router was first fitted on; tasks that come later are
    read by it as it is, so that nothing known of the others changes.

    Attributes:
        mean: (dims of a row,).
        directions: (dims of a row, components).
    """

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, rows: Tensor, components: int) -> Reading:
        """The principal components of rows (images, dims of a row)."""
        mean, deviation = rows.mean(0), rows.std(0)
        moves = deviation > _CONSTANT * deviation.quantile(0.75)
        scale = torch.where(moves, 1 / deviation, 0)
        scaled = (rows - mean) * scale
        # By the eigenvectors of the smaller square: singular vectors take five times as long.
        few = len(scaled) < scaled.shape[1]
        _, axes = torch.linalg.eigh(scaled @ scaled.T if few else scaled.T @ scaled)
        leading = axes.flip(1)[:, : min(components, len(rows) - 1)]
        if few:
            leading = normalize(scaled.T @ leading, dim=0)
        # in the precision of the file, so that a saved router routes as it did
        return cls(mean.float(), (scale[:, None] * leading).float())

    def __call__(self, rows: Tensor) -> Tensor:
        """(images, dims of a row) -> (images, components), float64."""
        return (rows - self.mean) @ self.directions.double()

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "directions": self.directions}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Reading:
        """What ``tensors`` gave.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        if tensors.keys() != {"mean", "directions"}:
            raise ValueError(f"reading has {sorted(tensors)}, and needs ['directions', 'mean']")
        mean, directions = tensors["mean"], tensors["directions"]
        if mean.ndim != 1 or directions.ndim != 2 or len(directions) != len(mean):
            raise ValueError(
                f"reading.mean and reading.directions of shapes {tuple(mean.shape)} and "
                f"{tuple(directions.shape)} do not fit"
            )
        if not (mean.isfinite().all() and directions.isfinite().all()):
            raise ValueError("reading has numbers that are not finite")
        return cls(mean, directions)
