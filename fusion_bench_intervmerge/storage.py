"""Tensors as bytes: fewer of them for edits (half precision, or a byte a number), and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["float32", "float16", "int8"]
SCALE = ".scale"


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    """SHA-256 of a file's header, if it has one, and of tensors: names, shapes, types, bytes."""
    sha = hashlib.sha256(b"" if header is None else json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return sha.hexdigest()


def pack(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Tensors as a file holds them.

    With ``int8`` a row x becomes round(x / s), s = max |x| / 127, and its scale s, which stands
    under the tensor's name with ``.scale`` behind it; a vector is one row. s is rounded up to 16
    binary digits, so that s times a whole number is exact: packing what was unpacked changes
    nothing.

    Args:
        tensors: in float32, by name.
        storage: ``float32``, ``float16`` or ``int8``.

    Raises:
        ValueError: a number too large for half precision.
    """
    if storage == "float32":
        return dict(tensors)
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if storage == "float16":
            packed[name] = tensor.half()
            if not packed[name].isfinite().all():
                raise ValueError(f"{name} has numbers beyond float16's, 65504; store int8")
        else:
            scale = _coarse(tensor.abs().amax(dim=-1, keepdim=True) / 127)
            whole = torch.where(scale > 0, tensor / scale, 0).round().clamp(-127, 127)
            packed |= {name: whole.to(torch.int8), name + SCALE: scale}
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``pack`` was given, rounded, in float32.

    Raises:
        ValueError: a scale is missing, or does not fit.
    """
    tensors, unused = {}, {name for name in packed if name.endswith(SCALE)}
    for name, tensor in packed.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == torch.int8:
            scale = packed.get(name + SCALE)
            if scale is None or scale.shape != (*tensor.shape[:-1], 1):
                raise ValueError(f"{name} has no scale a row")
            unused.remove(name + SCALE)
            tensor = tensor * scale
        tensors[name] = tensor.float()
    if unused:
        raise ValueError(f"{min(unused)} scales no tensor")
    return tensors


def size(tensors: Mapping[str, Tensor], storage: Storage) -> int:
    """Bytes of the packed tensors."""
    return sum(t.numel() * t.element_size() for t in pack(tensors, storage).values())


def _coarse(scale: Tensor) -> Tensor:
    """Positive float32 numbers rounded up to 16 binary digits."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFF) & ~0xFF).view(torch.float32)
