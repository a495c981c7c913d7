"""The training state on disk: how a run that was stopped goes on.

A state is one safetensors file with the trained tensors, the optimizer's tensors and, in its
header, the step and what run it belongs to. It appears whole or not at all; the one before is kept
until the next is in place, and is used when the newest turns out torn.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import whole_file

log = logging.getLogger(__name__)
KEPT = 2


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        losses: (steps done, tasks).
    """

    step: int
    losses: Tensor


class StateFolder:
    """The states of one run.

    Args:
        folder: where they are kept.
        run: what identifies the run; a state of another run is not taken.
    """

    def __init__(self, folder: Path, run: str):
        self.folder, self.run = folder, run

    def save(
        self,
        progress: Progress,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> Path | None:
        """Write a state. A failure (a full disk, say) is reported and the older state stays."""
        tensors = {f"trained.{name}": p.detach() for name, p in trained.items()}
        tensors["losses"] = progress.losses
        numbers: dict[str, Any] = {}
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers[f"{index}.{name}"] = value
        header = {"run": self.run, "step": str(progress.step), "numbers": json.dumps(numbers)}
        path = self.folder / f"step-{progress.step:08d}.safetensors"
        try:
            with whole_file(path) as temporary:
                save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, header)
        except (ConfigError, SafetensorError, OSError) as error:
            log.warning("the state of step %d was not kept: %s", progress.step, error)
            return None
        for old in self._files()[KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def load(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Progress | None:
        """Take over the newest readable state of this run; None when there is none."""
        for path in self._files():
            try:
                return self._load(path, trained, optimizer)
            except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
                log.warning("%s is unusable (%s); trying the state before it", path, error)
        return None

    def clear(self) -> None:
        """Remove the states of a run that has finished."""
        # also what a killed process was in the middle of writing
        for path in [*self._files(), *self.folder.glob(".step-*")]:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def _load(
        self, path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Progress:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("run") != self.run:
            raise ValueError("it belongs to another run")
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = tensor
        for name, value in json.loads(header["numbers"]).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        for name, parameter in trained.items():
            if tensors[f"trained.{name}"].shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"trained.{name}"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return Progress(int(header["step"]), tensors["losses"])
