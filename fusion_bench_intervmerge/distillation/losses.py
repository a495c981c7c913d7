"""How far the repaired encoder's representations are from the expert's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A task's representations by name: "output" (batch, projection_dim) image features, and for the
# block-wise loss "blocks" (batch, num_blocks, width) means over the tokens of each block's output.
Representations = dict[str, Tensor]
Loss = Callable[[Representations, Representations, int], Tensor]


def output(student: Representations, expert: Representations, tasks: int) -> Tensor:
    """Mean L1 of the image features (eq 3.2 of the paper), a value a task: (tasks,)."""
    return _mean_l1(student["output"], expert["output"], tasks)


def blocks(student: Representations, expert: Representations, tasks: int) -> Tensor:
    """SurgeryV2 (arXiv 2410.14389): mean L1 of every block's token mean, and of the features."""
    width = student["blocks"].shape[-1]
    per_block = _mean_l1(student["blocks"], expert["blocks"], tasks)
    num_blocks = student["blocks"].numel() // (len(student["blocks"]) * width)
    return per_block * num_blocks + output(student, expert, tasks)


def _mean_l1(student: Tensor, expert: Tensor, tasks: int) -> Tensor:
    """Images follow one another in equal groups, one a task."""
    wide = torch.promote_types(student.dtype, torch.float32)
    difference = (student.to(wide) - expert.to(wide)).abs()
    return difference.view(tasks, -1).mean(dim=1)


LOSSES: dict[str, Loss] = {"output": output, "blocks": blocks}
