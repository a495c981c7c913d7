"""Tensors as bytes: fewer of them for edits (half precision, or a byte a number), and digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import ArtifactError, ConfigError, Json, Strict, check_task_name, checked
from ..encoders import tower_from_spec
from ..encoders.base import VisionTower
from ..files import opened_folder, whole_folder
from .card import model_card
from .router import Router, read_router

if TYPE_CHECKING:
    from .model import InterventionModel

# == storage
# Tensors as bytes: fewer of them for edits (half precision, or a byte a number), and digests.
Storage = Literal["float32", "float16", "int8"]
SCALE = ".scale"


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


# == hub.names
# Which names are folders, and which are models on a hub.
# == artifact
# A saved model: plain files that any tool can read, and nothing is ever unpickled.
#
# ::
#
#     config.json                       format version, tower, tasks, interventions, and a SHA-256 of
#                                       its own content and of every other file but the model card
#     interventions/<task>.safetensors  a task's edits: <site>.<block>.<tensor>
#     coefficients.safetensors          merging coefficients, when they were trained
#     router.safetensors                what tells the task of an image, if anything does
#     merged/model.safetensors          the merged encoder, under its family's usual names
#     README.md                         a model card
#
FORMAT = 2
MERGED = "merged/model.safetensors"
MERGED_CONFIG = "merged/config.json"
COEFFICIENTS = "coefficients.safetensors"
ROUTER = "router.safetensors"
# Settings in a file may be of any kind; whatever they break is the file's fault.
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Config(Strict):
    """What config.json says; the encoder has yet to accept it."""

    format: int
    tower: Json
    tasks: list[str]
    interventions: dict[str, Json]
    seed: int
    # task -> site -> block -> rank, where they are not all as ``interventions`` says
    ranks: dict[str, dict[str, dict[str, Annotated[int, Field(ge=1)]]]] | None = None
    metadata: Json = Field(default_factory=dict)
    router: Json | None = None
    storage: Storage = "float32"
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]


@dataclass
class Artifact:
    """A saved model in memory.

    Attributes:
        config: its settings.
        tower: the merged encoder.
        edits: task -> its edits' tensors, named ``<site>.<block>.<tensor>``.
        metadata: JSON values; tensors under ``coefficients``.
        router: what tells the task of an image, if anything does.
    """

    config: Config
    tower: VisionTower
    edits: Mapping[str, Mapping[str, Tensor]]
    metadata: Json
    router: Router | None


def write(model: InterventionModel, folder: Path, card_name: str | None = None) -> None:
    """Write a model to a folder; a saved model of that name is replaced as a whole.

    Args:
        model: what to write.
        folder: where to.
        card_name: what the model card calls it, the folder's name where None.

    Raises:
        ConfigError: the folder cannot be written to, or holds something else than a saved model.
    """
    check_place(folder, str(folder))
    with whole_folder(folder, partial(check_place, folder, str(folder))) as temporary:
        (temporary / "merged").mkdir()
        (temporary / "interventions").mkdir()
        _save(model.tower.weights(), temporary / MERGED, {"format": "pt"})
        if (library := model.tower.library_config()) is not None:
            (temporary / MERGED_CONFIG).write_text(json.dumps(library, indent=2) + "\n")
        for task in model.tasks:
            edits = pack(model.edits_of(task).tensors(), model.storage)
            _save(edits, temporary / _edits_file(task))
        metadata = dict(model.metadata)
        coefficients = metadata.pop("coefficients", None)
        if coefficients is not None:
            _save(coefficients, temporary / COEFFICIENTS)
        if model.router is not None:
            _save(model.router.tensors(), temporary / ROUTER)
        config = {
            "format": FORMAT,
            "tower": model.tower.spec(),
            "tasks": model.tasks,
            "interventions": {s: c.to_dict() for s, c in model.interventions.items()},
            "seed": model.seed,
            "ranks": model.unequal_ranks(),
            "metadata": metadata,
            **({} if model.router is None else {"router": model.router.config()}),
            **({} if model.storage == "float32" else {"storage": model.storage}),
            "files": {
                file.relative_to(temporary).as_posix(): _digest_of_file(file)
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            },
        }
        config = json.loads(json.dumps(config))  # as it will be read: tuples are lists
        config["digest"] = _digest_of_config(config)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        card = model_card(model, card_name or folder.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def read(folder: Path) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: a file is missing, torn, of another format, or does not fit the others.
    """
    try:
        with misfits_in(folder), opened_folder(folder) as opened:
            return _read(folder, opened)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder}: no artifact here (there is no config.json)") from None
    except OSError as error:
        raise ArtifactError(f"{folder}: not readable ({error.strerror or error})") from None


@contextmanager
def misfits_in(place: str | Path) -> Iterator[None]:
    """What does not fit in a file or folder, as an ``ArtifactError`` of one line."""
    try:
        yield
    except ArtifactError:
        raise
    except _MISFITS as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise ArtifactError(f"{place}: {said[0]}") from None


def check_place(folder: Path, where: str) -> None:
    """Make sure that a folder is absent, empty, or a saved model and nothing else.

    Raises:
        ConfigError: what is in the way, in one line; it names the config key ``where``.
    """
    allowed = "a new or empty folder, or that of a saved model"
    if folder.is_dir():
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ConfigError(where, f"{folder} cannot be read", allowed)
        if os.path.ismount(folder):
            raise ConfigError(where, f"{folder} is a mount point", "a folder in it")
        ours = _own_entries(folder)
        for entry in folder.rglob("*"):  # to the first that is not ours: it may be a whole home
            name = entry.relative_to(folder).as_posix()
            if name not in ours:
                raise ConfigError(where, f"{folder} holds {name}, which would be lost", allowed)
    elif os.path.lexists(folder):
        raise ConfigError(where, f"{folder} is no folder", allowed)
    parent = folder.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(where, f"{parent} cannot be written to", "a writable folder")


def _own_entries(folder: Path) -> set[str]:
    """The files and folders of the saved model in a folder; none if there is no saved model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] == FORMAT and isinstance(config["interventions"], dict):
            files = ["config.json", "README.md", *_files_of(config["tasks"])]
            return {"merged", "interventions", *files}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return set()


def _read(folder: Path, opened: Path) -> Artifact:
    """Read an artifact that is called ``folder`` in errors, and is opened at ``opened``."""
    config = _read_config(folder / "config.json", opened / "config.json")
    known = _files_of(config.tasks)
    for name, digest in config.files.items():
        if name not in known:
            raise ArtifactError(f"{folder / 'config.json'}: files: unknown: {name[:60]!r}")
        _check_file(folder / name, opened / name, digest)

    def tensors(name: str) -> dict[str, Tensor]:
        if name not in config.files:
            raise ArtifactError(f"{folder / 'config.json'}: files: {name} is missing")
        try:
            return load_file(opened / name)
        except SafetensorError as error:
            raise ArtifactError(f"{folder / name}: no safetensors file ({error})") from None

    weights = tensors(MERGED)
    with torch.device("meta"):  # no memory is taken before the sizes are known to fit
        plan = tower_from_spec(config.tower)
        plan.load_weights({name: torch.empty_like(t, device="meta") for name, t in weights.items()})
    tower = tower_from_spec(config.tower)
    tower.load_weights(weights)
    edits = {task: tensors(_edits_file(task)) for task in config.tasks}
    if config.storage != "float32":
        edits = {task: unpack(packed) for task, packed in edits.items()}
    metadata = dict(config.metadata)
    if COEFFICIENTS in config.files:
        metadata["coefficients"] = tensors(COEFFICIENTS)
    router = None
    if config.router is not None:
        with misfits_in(folder / ROUTER):
            router = read_router(config.router, tensors(ROUTER), config.tasks)
    return Artifact(config, tower, edits, metadata, router)


def _read_config(path: Path, opened: Path) -> Config:
    try:
        config = json.loads(opened.read_text(encoding="utf-8"))
        found = config.get("format") if isinstance(config, dict) else None
        if found != FORMAT:
            raise ArtifactError(f"{path}: format {found!r}; this version reads format {FORMAT}")
        if config.pop("digest", None) != _digest_of_config(config):
            raise ArtifactError(f"{path}: changed since it was saved (its digest says so)")
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from None
    with misfits_in(path):
        read = checked(Config, config)
        for index, task in enumerate(read.tasks):
            check_task_name(task, read.tasks[:index])
    return read


def _check_file(path: Path, opened: Path, digest: str) -> None:
    """Make sure that a file has the digest that config.json says."""
    try:
        if not opened.is_file():
            raise ArtifactError(f"{path}: missing")
        if digest != _digest_of_file(opened):
            meant = ", not the weights that the edits were trained on" * path.match(MERGED)
            why = "its digest differs from config.json's"
            raise ArtifactError(f"{path}: torn or another file{meant} ({why})")
    except OSError as error:
        raise ArtifactError(f"{path}: not readable ({error.strerror or error})") from None


def _digest_of_config(config: Mapping[str, object]) -> str:
    """SHA-256 of config.json's content but for this digest, however it is laid out."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(2**20):
            sha.update(chunk)
    return sha.hexdigest()


def _files_of(tasks: Sequence[str]) -> list[str]:
    """The files that an artifact may have beside config.json and the model card."""
    return [MERGED, MERGED_CONFIG, COEFFICIENTS, ROUTER, *map(_edits_file, tasks)]


def _edits_file(task: str) -> str:
    return f"interventions/{task}.safetensors"


def _save(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    # safetensors refuses tensors that share memory
    separate = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        save_file(separate, path, header)
    except SafetensorError as error:  # a full disk comes as one
        raise OSError(str(error)) from None
