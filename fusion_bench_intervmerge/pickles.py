"""Reads files by ``torch.save`` and ``pickle.dump`` without calling anything that they name.

Unpickling means calling what a file asks for. Here a name stays a name: nothing of that name is
looked up, so there is nothing that a file could call, change or leave behind. What comes out are
plain values, stand-ins that hold the attributes of an object, and views of tensors, each checked
against the bytes that are there and copied out only when it is wanted.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

Buffer = mmap.mmap | bytes
Stream = mmap.mmap | io.BytesIO


class ForbiddenName(pickle.UnpicklingError):
    """The file asks for a class or function that is not on the list."""

    def __init__(self, name: str):
        self.name = name
        super().__init__(f"asks for {name}")


@dataclass(frozen=True)
class Name:
    """A class or function as a file calls it."""

    text: str


class StandIn:
    """An object of a listed class: its attributes, and nothing else."""

    def __init__(self, name: str):
        self.name, self.state = name, dict[str, Any]()


@dataclass
class Storage:
    """The bytes of a tensor, where they lie.

    Attributes:
        numel, dtype: how many elements of which type the file says it has.
        content: the file, or a part of it.
        start: where the storage begins in it, in bytes.
    """

    numel: int
    dtype: torch.dtype
    content: Buffer = b""
    start: int = 0


@dataclass(frozen=True)
class View:
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.size, *self.stride)
        if any(type(n) is not int or n < 0 for n in numbers) or len(self.size) != len(self.stride):
            raise pickle.UnpicklingError("a tensor has no shape")

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """A copy in memory.

        Raises:
            UnpicklingError: the view does not lie within its storage, or that not within the file.
        """
        storage, item = self.storage, self.storage.dtype.itemsize
        if storage.start + storage.numel * item > len(storage.content):
            raise pickle.UnpicklingError("a storage is larger than the file")
        if 0 in self.size:
            return torch.empty(self.size, dtype=storage.dtype)
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if self.offset + last >= storage.numel or self.nbytes > storage.numel * item:
            raise pickle.UnpicklingError("a tensor is larger than its storage")
        found = np.ndarray(
            (*self.size, item),
            np.uint8,
            storage.content,
            storage.start + self.offset * item,
            (*(step * item for step in self.stride), 1),
        )
        # bytes of their own, wherever in the file they lay
        return torch.from_numpy(found.copy()).view(storage.dtype).reshape(self.size)


def copy_out(views: Mapping[str, View], limit: int) -> dict[str, Tensor]:
    """The tensors of these views.

    Raises:
        UnpicklingError: together they have more bytes than ``limit`` (the file's own size), since
            they show the same ones over and over; or one does not lie within the file.
    """
    if sum(view.nbytes for view in views.values()) > limit:
        raise pickle.UnpicklingError("its tensors are larger than the file")
    return {name: view.tensor() for name, view in views.items()}


def read(path: Path, classes: Collection[str] = ()) -> object:
    """What a file holds: numbers, strings, containers, ``StandIn``, ``Name`` and ``View``.

    Args:
        path: a file by ``torch.save``, of either format, or by ``pickle.dump``.
        classes: further names (``module.name``) that may occur; an object of such a class, or what
            a call of such a function gives, is a ``StandIn``.

    Raises:
        ForbiddenName: the file asks for another name.
        UnpicklingError: it is broken; other exceptions are possible, as it may be so in many ways.
    """
    with path.open("rb") as stream:
        # Pages are read when they are wanted, and a length that lies ends at the file's end.
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return _read(content, frozenset([*_CALLS, *_STORAGES, *_TYPES, *classes]))


def read_tensor(path: Path) -> Tensor:
    """The one tensor that a file holds.

    Raises:
        ValueError: it holds something else; the others are those of ``read``.
    """
    found = read(path)
    if not isinstance(found, View):
        raise ValueError(f"it holds a {type(found).__name__}, not a tensor")
    return copy_out({"": found}, path.stat().st_size)[""]


# -- the two formats of torch.save -----------------------------------------------------------------

# What torch.save's files started with before they became zip archives.
_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
# of an entry of a zip archive: the lengths of its name and of the extra field behind it
_LOCAL_HEADER = struct.Struct("<26xHH")


def _read(content: Buffer, allowed: Collection[str]) -> object:
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    if content[:2] == b"PK":
        return _read_zip(stream, content, allowed)
    if content[: len(_LEGACY)] == _LEGACY:
        return _read_legacy(stream, content, allowed)
    return _Reader(stream, allowed).load()


def _read_zip(stream: Stream, content: Buffer, allowed: Collection[str]) -> object:
    entries = {entry.filename: entry for entry in zipfile.ZipFile(stream).infolist()}  # type: ignore[arg-type]
    (main,) = (name for name in entries if name.partition("/")[2] == "data.pkl")
    folder = main.removesuffix("data.pkl")

    def find(name: str) -> tuple[int, int]:
        entry = entries[folder + name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise pickle.UnpicklingError("the archive is compressed or encrypted")
        lengths = _LOCAL_HEADER.unpack_from(content, entry.header_offset)
        return entry.header_offset + 30 + sum(lengths), entry.file_size

    def record(name: str) -> bytes:
        start, size = find(name)
        return content[start : start + size]

    if folder + "byteorder" in entries and record("byteorder").decode() != sys.byteorder:
        raise pickle.UnpicklingError("the bytes of its numbers are in another order")

    def storage(key: object, numel: int, dtype: torch.dtype) -> Storage:
        start, size = find(f"data/{key}")
        if numel * dtype.itemsize > size:
            raise pickle.UnpicklingError("a storage is larger than its record")
        return Storage(numel, dtype, content, start)

    return _Reader(io.BytesIO(record("data.pkl")), allowed, storage).load()


def _read_legacy(stream: Stream, content: Buffer, allowed: Collection[str]) -> object:
    """Magic number, version, system, the object, the storages' keys, the storages."""
    _, version, system = (_Reader(stream).load() for _ in range(3))
    if version != 1001 or system["little_endian"] != (sys.byteorder == "little"):
        raise pickle.UnpicklingError("the bytes of its numbers are in another order")
    storages: dict[object, Storage] = {}

    def storage(key: object, numel: int, dtype: torch.dtype) -> Storage:
        return storages.setdefault(key, Storage(numel, dtype))

    result = _Reader(stream, allowed, storage).load()
    for key in _Reader(stream).load():
        found = storages[key]
        (stored,) = struct.unpack("<q", stream.read(8))
        if stored != found.numel:
            raise pickle.UnpicklingError("a storage has another size than the file says")
        found.content, found.start = content, stream.tell()
        stream.seek(stored * found.dtype.itemsize, io.SEEK_CUR)
    return result


# -- pickles ---------------------------------------------------------------------------------------

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_TYPES = [str(dtype) for dtype in _DTYPES.values()]
# the calls that put tensors and containers together
_CALLS: dict[str, Callable[..., object]] = {
    "builtins.set": lambda items=(): {_key(item) for item in items},
    "collections.OrderedDict": lambda items=(): OrderedDict((_key(k), v) for k, v in items),
    "torch.Size": lambda size: size,
    "torch.device": lambda *names: str(names),
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
}
_CALLS["__builtin__.set"] = _CALLS["builtins.set"]  # its name in protocol 2


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> View:
    """``rest``: whether a gradient is wanted, hooks, and bits such as "negated"."""
    if not isinstance(storage, Storage) or not isinstance(size, tuple | list) or any(rest[2:]):
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    return View(storage, offset, tuple(size), tuple(stride))


def _nested_storage(content: bytes) -> Storage:
    """A storage in a plain pickle is a file by ``torch.save`` within the file."""
    found = _read(content, _STORAGES)
    if not isinstance(found, Storage):
        raise pickle.UnpicklingError("a storage of an unknown kind")
    return found


_CALLS["torch._utils._rebuild_tensor"] = _CALLS["torch._utils._rebuild_tensor_v2"] = _tensor
_CALLS["torch.storage._load_from_bytes"] = _nested_storage


def _key(value: object) -> object:
    """Only plain values are hashed: the hash of a deeply nested tuple would exhaust the stack."""
    if not isinstance(value, str | bytes | int | float | None):
        raise pickle.UnpicklingError(f"a {type(value).__name__} is no key")
    return value


class _Reader(pickle._Unpickler):
    """Python's own reader of pickles, with the instructions that call or change things replaced.

    Args:
        stream: where the pickle starts.
        allowed: the names that may occur.
        storage: finds a storage by key, number of elements and type.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    stack: list[object]
    pop_mark: Callable[[], list[object]]

    def __init__(
        self,
        stream: Stream,
        allowed: Collection[str] = (),
        storage: Callable[[object, int, torch.dtype], Storage] | None = None,
    ):
        super().__init__(stream, encoding="utf-8")
        self._allowed, self._storage = allowed, storage

    def find_class(self, module: str, name: str) -> Name:
        text = f"{module}.{name}"
        if text not in self._allowed:
            raise ForbiddenName(text)
        return Name(text)

    def persistent_load(self, saved: object) -> object:
        kind, *rest = saved if isinstance(saved, tuple) else (saved,)
        if kind == "module" and len(rest) == 3:  # a class with its source
            return rest[0]
        if kind != "storage" or len(rest) < 4 or any(rest[4:]) or self._storage is None:
            raise pickle.UnpicklingError("it refers to something unknown")
        storage_type, key, _, numel = rest[:4]
        if not isinstance(storage_type, Name) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return self._storage(_key(key), numel, _STORAGES[storage_type.text])

    def _call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that is no name")
        if function.text in _CALLS:
            return _CALLS[function.text](*arguments)
        return StandIn(function.text)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, OrderedDict):
            return  # torch's state dicts have a version in an attribute
        if not isinstance(target, StandIn) or not isinstance(state, dict):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")
        target.state.update(state)

    def _set_items(self) -> None:
        self._fill(self.pop_mark())

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _fill(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        target.update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise pickle.UnpicklingError("it adds to something that is no set")
        target.update(map(_key, items))


_REPLACED = {
    pickle.REDUCE: _Reader._reduce,
    pickle.NEWOBJ: _Reader._reduce,
    pickle.BUILD: _Reader._build,
    pickle.SETITEMS: _Reader._set_items,
    pickle.SETITEM: _Reader._set_item,
    pickle.ADDITEMS: _Reader._add_items,
}
# Of the others, some make room for what a file only claims to have, and some call.
_KEPT = """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINPERSID
"""
_Reader.dispatch = {
    code: action
    for code, action in pickle._Unpickler.dispatch.items()
    if code in {getattr(pickle, name)[0] for name in _KEPT.split()}
} | {code[0]: action for code, action in _REPLACED.items()}
