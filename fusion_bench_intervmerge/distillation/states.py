"""The state of a run on disk: how a run that was stopped goes on.

A state is one safetensors file with the trained tensors, the optimizer's tensors and, in its
header, the step, the run it belongs to, and a digest of all of it. The state before is kept until
the next is in place, and is used when the newest is torn. A state is checked as a whole before
anything is taken from it.
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ConfigError, Json
from ..data import digest_of
from ..files import atomic_file

log = logging.getLogger(__name__)
KEPT = 2
KINDS = ("solved", "step")


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message, one line, says what goes on from where."""


@contextmanager
def interruptible(doing: str, states: StateFolder | None = None) -> Iterator[None]:
    """Ctrl-C inside becomes an ``Interrupted`` that says what was being done, and what is kept."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        kept = None if states is None else states.newest()
        more = "" if kept is None else f"; the same command goes on from step {kept}"
        raise Interrupted(f"stopped while {doing}{more}") from None


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C, which then waits for the step's end; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


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
        kind: the part of the run, one of ``KINDS``; each has its own files.
    """

    def __init__(self, folder: Path, run: str, kind: str = "step"):
        self.folder, self.run, self.kind = folder, run, kind

    def of(self, kind: str) -> StateFolder:
        """The states of another of the run's parts."""
        return StateFolder(self.folder, self.run, kind)

    def save(
        self,
        progress: Progress,
        trained: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Path | None:
        """Write a state. A failure (a full disk, say) is reported and the older state stays."""
        tensors = {f"trained.{name}": tensor.detach() for name, tensor in trained.items()}
        tensors["losses"] = progress.losses
        numbers: Json = {}
        for name, value in _entries(optimizer).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}"] = value
            else:
                numbers[name] = value
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = {"run": self.run, "step": str(progress.step), "numbers": json.dumps(numbers)}
        path = self.folder / f"{self.kind}-{progress.step:08d}.safetensors"
        try:
            write_tensors(path, tensors, header)
        except (ConfigError, SafetensorError, OSError) as error:
            log.warning("the state of step %d was not kept: %s", progress.step, error)
            return None
        for old in self._files()[KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def load(
        self,
        start: Progress,
        steps: int,
        trained: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Progress:
        """Take over the newest sound state of this run.

        Args:
            start: where the run stands without a state.
            steps: of the whole run; a state beyond them is not taken.
            trained: tensors by name, written in place.
            optimizer: of these tensors, before its first step.

        Returns:
            Where the run stands now. Without a sound state it is ``start``, and nothing is changed.
        """
        state = self._newest_sound(lambda state: state.check(start, steps, trained, optimizer))
        if state is None:
            return start
        state.restore(trained, optimizer)
        return state.progress

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the newest sound state of this run; none if there is no such state."""
        state = self._newest_sound(lambda state: None)
        return {} if state is None else state.trained

    def newest(self) -> int | None:
        """The step of the newest state, sound or not."""
        return next((int(path.stem.removeprefix(f"{self.kind}-")) for path in self._files()), None)

    def clear(self) -> None:
        """Remove the states of every kind, once the run's result is kept elsewhere."""
        for kind in KINDS:
            for path in self.of(kind)._files():
                path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _newest_sound(self, check: Callable[[_State], None]) -> _State | None:
        for path in self._files():
            try:
                state = self._read(path)
                check(state)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                log.warning("%s is unusable (%s); trying the state before it", path, error)
            else:
                return state
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.kind}-*.safetensors"), reverse=True)

    def _read(self, path: Path) -> _State:
        tensors, header = read_tensors(path)
        if header["run"] != self.run:
            raise ValueError("it belongs to another run")
        losses = tensors.pop("losses")
        found: dict[str, Json] = {"trained": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            found[kind][rest] = tensor
        found["optimizer"] |= json.loads(header["numbers"])
        return _State(Progress(int(header["step"]), losses), **found)


@dataclass
class _State:
    """A state in memory.

    Attributes:
        trained: tensors by name.
        optimizer: what the optimizer keeps of each tensor, by ``<index of the tensor>.<name>``.
    """

    progress: Progress
    trained: dict[str, Tensor]
    optimizer: Json

    def check(
        self,
        start: Progress,
        steps: int,
        trained: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Raises ValueError: what keeps this state from being the run's."""
        step, losses = self.progress.step, self.progress.losses
        if not 0 < step <= steps:
            raise ValueError(f"it is of step {step}, of {steps}")
        rows = losses.new_empty(step, *start.losses.shape[1:])
        _compare({"losses": losses}, {"losses": rows})
        _compare(self.trained, trained)
        _compare(self.optimizer, _entries_after_a_step(optimizer))

    @torch.no_grad()
    def restore(
        self, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None
    ) -> None:
        for name, tensor in trained.items():
            tensor.copy_(self.trained[name])
        if optimizer is not None:
            state: dict[int, Json] = {}
            for name, value in self.optimizer.items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def _entries(optimizer: torch.optim.Optimizer | None) -> Json:
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()
    }


def _entries_after_a_step(optimizer: torch.optim.Optimizer | None) -> Json:
    """What an optimizer keeps once it has stepped; the one given does not step."""
    copied = copy.deepcopy(optimizer)
    if copied is not None:
        for group in copied.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        copied.step()
    return _entries(copied)


def _compare(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    for name in expected.keys() | found.keys():
        if name not in found:
            raise ValueError(f"it lacks {name}")
        if name not in expected:
            raise ValueError(f"it has an unknown {name}")
        if _kind(found[name]) != _kind(expected[name]):
            raise ValueError(f"its {name} is {_kind(found[name])}, not {_kind(expected[name])}")


def _kind(value: object) -> object:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)


# -- a file with a digest --------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file with a digest in its header, whole or not at all."""
    with atomic_file(path) as temporary:
        digest = digest_of(tensors, header)
        save_file(dict(tensors), temporary, {**header, "digest": digest})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``write_tensors`` was given.

    Raises:
        ValueError: the digest is not that of the content.
    """
    with safe_open(path, framework="pt") as file:
        header, names = file.metadata() or {}, file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if header.pop("digest", None) != digest_of(tensors, header):
        raise ValueError("its digest is not that of its content")
    return tensors, header
