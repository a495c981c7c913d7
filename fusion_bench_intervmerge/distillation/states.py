"""The state of a training on disk: a run that was stopped goes on from it, with the same bits."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import RunFolder
from ..files import atomic_file

log = logging.getLogger(__name__)
FILE = "training.pt"
# What torch raises for a file that it did not write, and what a state of other things breaks.
_UNUSABLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)


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
    """Replace the state; if that fails (a full disk, say), it is logged and the older one stays.

    Returns:
        Whether the state was written.
    """
    state = {
        "run": folder.run,
        "step": progress.step,
        "losses": progress.losses.clone(),  # a view of all steps
        "trained": {name: tensor.detach().cpu() for name, tensor in trained.items()},
        "optimizer": optimizer.state_dict(),
    }
    try:
        with atomic_file(folder.file(FILE)) as temporary:
            torch.save(state, temporary)
    except (ConfigError, OSError, RuntimeError) as error:
        log.warning("the state of step %d was not kept: %s", progress.step, error)
        return False
    folder.progress = f"the same command goes on from step {progress.step}"
    return True


@torch.no_grad()
def load_state(
    folder: RunFolder,
    start: Progress,
    steps: int,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Take over the state of this run; one that is torn or of another run is logged and left.

    Args:
        folder: the run's.
        start: where the run stands without a state.
        steps: of the whole run.
        trained: tensors by name, written in place.
        optimizer: of these tensors, before its first step.

    Returns:
        Where the run stands now.
    """
    path = folder.file(FILE)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        progress = Progress(state["step"], state["losses"])
        if state["run"] != folder.run:
            raise ValueError("it belongs to another run")
        if not 0 < progress.step <= steps:
            raise ValueError(f"it is of step {progress.step}, of {steps}")
        if _kinds(state["trained"]) != _kinds(trained):
            raise ValueError("its tensors are not those of this run")
        if progress.losses.shape != (progress.step, *start.losses.shape[1:]):
            raise ValueError("its losses are not those of this run")
        optimizer.load_state_dict(state["optimizer"])
    except FileNotFoundError:
        return start
    except _UNUSABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("%s is not used, and the training starts anew: %s", path, reason)
        return start
    for name, tensor in trained.items():
        tensor.copy_(state["trained"][name])
    folder.progress = f"the same command goes on from step {progress.step}"
    return progress


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
