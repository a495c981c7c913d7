"""How far the repaired encoder's representations are from the expert's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoders.base import AfterBlock

# A task's representations by name: "output" (batch, projection_dim) image features, and for the
# block-wise loss "blocks" (batch, num_blocks, width) means over the tokens of each block's output.
Representations = dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss, and which representations it compares.

    Attributes:
        of: (repaired encoder's, experts', number of tasks) -> the loss of each task, (tasks,). The
            batch holds equal numbers of images of one task after the other.
        reads_blocks: whether it compares every block's output.
    """

    of: Callable[[Representations, Representations, int], Tensor]
    reads_blocks: bool = False

    def read(self, encode: Callable[[AfterBlock | None], Tensor]) -> Representations:
        """The representations of the forward pass ``encode(after_block)``."""
        if not self.reads_blocks:
            return {"output": encode(None)}
        means: list[Tensor] = []
        features = encode(lambda _, states: means.append(states.mean(dim=1)))
        return {"blocks": torch.stack(means, dim=1), "output": features}


def output(student: Representations, expert: Representations, tasks: int) -> Tensor:
    """Mean L1 of the image features (eq 3.2 of the paper)."""
    return _mean_l1(student["output"], expert["output"], tasks)


def blocks(student: Representations, expert: Representations, tasks: int) -> Tensor:
    """SurgeryV2 (arXiv 2410.14389): mean L1 of every block's token mean, and of the features."""
    per_block = _mean_l1(student["blocks"], expert["blocks"], tasks)
    return per_block * student["blocks"].shape[1] + output(student, expert, tasks)


def _mean_l1(student: Tensor, expert: Tensor, tasks: int) -> Tensor:
    wide = torch.promote_types(student.dtype, torch.float32)
    difference = (student.to(wide) - expert.to(wide)).abs()
    return difference.view(tasks, -1).mean(dim=1)


LOSSES = {"output": Loss(output), "blocks": Loss(blocks, reads_blocks=True)}
