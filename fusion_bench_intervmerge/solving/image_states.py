"""The states of a task's images between two blocks: in memory, and beyond a limit on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class ImageStates:
    """Batches of states, each replaced by the next block's as the images move on.

    What does not fit in memory lies in a temporary file that the system maps into memory and
    drops with this object; its pages are read and written once a block.

    Args:
        room: bytes that may be held in memory.
        device: where batches are computed.
    """

    def __init__(self, room: float, device: torch.device):
        self._room, self._device = room, device
        self._batches: list[Tensor] = []
        self._mapped: dict[int, Tensor] = {}  # the file of a batch, flat
        self._folder = tempfile.TemporaryDirectory(prefix="states-")

    def append(self, states: Tensor) -> None:
        """Add a batch."""
        index, count = len(self._batches), states.numel()
        self._batches.append(states)
        self._room -= count * states.element_size()
        if self._room < 0:
            path = str(Path(self._folder.name) / str(index))
            self._mapped[index] = torch.from_file(path, shared=True, size=count, dtype=states.dtype)
            self[index] = states

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (states.to(self._device) for states in self._batches)

    def __setitem__(self, index: int, states: Tensor) -> None:
        """Replace a batch by one of the same shape, or of fewer tokens."""
        if index in self._mapped:
            held = self._mapped[index][: states.numel()].view(states.shape)
            states = held.copy_(states)
        self._batches[index] = states
