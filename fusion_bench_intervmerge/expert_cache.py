"""Experts' representations on disk: what one method computed, the next one reads.

An entry is used only where computing it again would give the same bits: the expert's weights, the
images' pixels, their order and batches, precision, processor and library all count.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .config import ConfigError
from .distillation.states import read_tensors, write_tensors

log = logging.getLogger(__name__)


class ExpertCache:
    """A folder of entries, at most ``limit`` bytes; those not used for longest are removed."""

    def __init__(self, folder: Path, limit: float = 2 * 2**30):
        self.folder, self.limit = folder, limit

    @staticmethod
    def key(*facts: object) -> str:
        """A name for what follows from these facts on this machine."""
        here = (
            torch.__version__,
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
            torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )
        return hashlib.sha256(repr((*facts, *here)).encode()).hexdigest()[:32]

    def get(self, key: str) -> tuple[dict[str, Tensor], str] | None:
        """An entry's tensors and its images' digest; None where there is no sound entry."""
        path = self._path(key)
        try:
            tensors, header = read_tensors(path)
            os.utime(path)
            return tensors, header["images"]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s is unusable (%s) and computed anew", path, error)
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor], images: str) -> None:
        """Keep an entry, unless it alone is over the limit or the disk is full."""
        if sum(t.numel() * t.element_size() for t in tensors.values()) > self.limit:
            return
        try:
            write_tensors(self._path(key), tensors, {"images": images})
            self._make_room()
        except (ConfigError, SafetensorError, OSError) as error:
            log.warning("experts' features were not kept: %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        found = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size
