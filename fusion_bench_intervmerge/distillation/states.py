"""The state of a training on disk: a run that was stopped goes on from it, with the same bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import RunFolder

log = logging.getLogger(__name__)
NAME = "training"


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: steps done.
        losses: (steps done, tasks).
    """

    step: int
    losses: Tensor


def save_state(
    folder: RunFolder,
    progress: Progress,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> bool:
    """Replace the state; see ``RunFolder.save``."""
    state = {
        "step": progress.step,
        "losses": progress.losses.clone(),  # a view of all steps
        "trained": {name: tensor.detach().cpu() for name, tensor in trained.items()},
        "optimizer": optimizer.state_dict(),
    }
    if saved := folder.save(NAME, state):
        folder.progress = f"the same command goes on from step {progress.step}"
    return saved


@torch.no_grad()
def load_state(
    folder: RunFolder,
    start: Progress,
    steps: int,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Take over the state of this run, in place; one that does not fit is logged and left.

    Args:
        folder: the run's.
        start: where the run stands without a state.
        steps: of the whole run.
        trained: tensors by name.
        optimizer: of these tensors, before its first step.
    """
    state = folder.load(NAME)
    if state is None:
        return start
    try:
        progress = Progress(state["step"], state["losses"])
        if not len(progress.losses) == progress.step <= steps:
            raise ValueError(f"it is of step {progress.step}, of {steps}")
        if _kinds(state["trained"]) != _kinds(trained):
            raise ValueError("its tensors are not those of this run")
        optimizer.load_state_dict(state["optimizer"])
    except (LookupError, ValueError) as error:
        log.warning("%s is not used: %s", folder.path, error)
        return start
    for name, tensor in trained.items():
        tensor.copy_(state["trained"][name])
    folder.progress = f"the same command goes on from step {progress.step}"
    return progress


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
