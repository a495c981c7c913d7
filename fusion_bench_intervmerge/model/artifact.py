"""A saved model: plain files that any tool can read, and nothing is ever unpickled.

::

    config.json                       format version, tower, tasks, interventions, and a SHA-256 of
                                      its own content and of every other file but the model card
    interventions/<task>.safetensors  a task's edits: <site>.<block>.<tensor>
    coefficients.safetensors          merging coefficients, if they were trained
    router.safetensors                the router, if there is one
    merged/model.safetensors          the merged encoder, under its family's usual names
    README.md                         a model card
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..config import ArtifactError, ConfigError, Json, Settings, check_task_name
from ..encoders import tower_from_spec
from ..encoders.base import VisionTower
from ..files import atomic_folder
from .router import Router, read_router

FORMAT = 2
CONFIG = "config.json"
MERGED = "merged/model.safetensors"
MERGED_CONFIG = "merged/config.json"
COEFFICIENTS = "coefficients.safetensors"
ROUTER = "router.safetensors"
OWN = {CONFIG, "README.md", "merged", "interventions", COEFFICIENTS, ROUTER}
# Settings in a file may be of any kind; whatever they break is the file's fault.
_MISFITS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)

Ranks = dict[str, dict[str, dict[str, Annotated[int, Field(ge=1)]]]]  # task -> site -> block
Storage = Literal["float32", "float16", "int8"]
SCALE = ".scale"


class Config(Settings):
    """The content of config.json; the encoder has yet to accept it."""

    format: int
    tower: Json
    tasks: list[str]
    interventions: dict[str, Json]
    seed: int
    ranks: Ranks | None = None
    metadata: Json = Field(default_factory=dict)
    router: Json | None = None
    storage: Storage = "float32"
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]


@dataclass
class Artifact:
    """A saved model in memory.

    Attributes:
        tower: the merged encoder.
        interventions: site -> settings.
        seed: of the edits' starting values.
        edits: task -> its edits' tensors, float32, named ``<site>.<block>.<tensor>``.
        ranks: task -> site -> block -> rank; None if all are as ``interventions`` says.
        metadata: JSON values; tensors under ``coefficients``.
        router: the router, if there is one.
        storage: the type in which edits are saved.
    """

    tower: VisionTower
    interventions: dict[str, Json]
    seed: int
    edits: Mapping[str, Mapping[str, Tensor]]
    ranks: Ranks | None
    metadata: Json
    router: Router | None
    storage: Storage

    def write(self, folder: Path, card: str) -> None:
        """Write it to a folder, with a model card; a saved model there is replaced as a whole.

        Raises:
            ConfigError: the folder cannot be written to, or holds something else than a saved
                model.
        """
        check_place(folder, str(folder))
        metadata = dict(self.metadata)
        coefficients = metadata.pop("coefficients", None)
        config = {
            "format": FORMAT,
            "tower": self.tower.spec(),
            "tasks": list(self.edits),
            "interventions": self.interventions,
            "seed": self.seed,
            "ranks": self.ranks,
            "metadata": metadata,
            **({} if self.router is None else {"router": self.router.config()}),
            **({} if self.storage == "float32" else {"storage": self.storage}),
        }
        with atomic_folder(folder) as temporary:
            (temporary / "merged").mkdir()
            (temporary / "interventions").mkdir()
            _save(self.tower.weights(), temporary / MERGED, {"format": "pt"})
            if (library := self.tower.library_config()) is not None:
                (temporary / MERGED_CONFIG).write_text(json.dumps(library, indent=2) + "\n")
            for task, tensors in self.edits.items():
                _save(pack(tensors, self.storage), temporary / _edits_file(task))
            if coefficients is not None:
                _save(coefficients, temporary / COEFFICIENTS)
            if self.router is not None:
                _save(self.router.tensors(), temporary / ROUTER)
            config["files"] = {
                file.relative_to(temporary).as_posix(): _digest(file.read_bytes())
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            config = json.loads(json.dumps(config))  # as it will be read: tuples are lists
            config["digest"] = _digest_of_config(config)
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            (temporary / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read a saved model.

        Raises:
            ArtifactError: a file is missing, torn, or of another format.
            ValueError: one that does not fit the others, among other errors; see ``misfits_in``.
        """
        config = _read_config(folder)

        def content(name: str) -> bytes:
            """A file, which is read once: what is used is what was checked."""
            if name not in config.files:
                raise ArtifactError(f"{folder / CONFIG}: files: {name} is missing")
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{path}: missing")
            content = path.read_bytes()
            if config.files[name] != _digest(content):
                meant = ", not the weights that the edits were trained on" * (name == MERGED)
                why = "its digest differs from config.json's"
                raise ArtifactError(f"{path}: torn or another file{meant} ({why})")
            return content

        def tensors(name: str) -> dict[str, Tensor]:
            with misfits_in(folder / name):
                return load(content(name))

        tower = tower_from_spec(config.tower)
        tower.load_weights(tensors(MERGED))
        if MERGED_CONFIG in config.files:
            content(MERGED_CONFIG)
        metadata, router = dict(config.metadata), None
        if COEFFICIENTS in config.files:
            metadata["coefficients"] = tensors(COEFFICIENTS)
        if config.router is not None:
            with misfits_in(folder / ROUTER):
                router = read_router(config.router, tensors(ROUTER), config.tasks)
        return cls(
            tower=tower,
            interventions=config.interventions,
            seed=config.seed,
            edits={task: unpack(tensors(_edits_file(task))) for task in config.tasks},
            ranks=config.ranks,
            metadata=metadata,
            router=router,
            storage=config.storage,
        )


@contextmanager
def misfits_in(place: str | Path) -> Iterator[None]:
    """Raise what does not fit in a file or folder as an ``ArtifactError`` of one line."""
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"{place}: not readable ({error.strerror or error})") from None
    except _MISFITS as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ArtifactError(f"{place}: {lines[0]}") from None


def check_place(folder: Path, where: str) -> None:
    """Make sure that a folder is absent, empty, or a saved model and nothing else.

    Raises:
        ConfigError: what is in the way, in one line; it names the config key ``where``.
    """
    allowed = "a new or empty folder, or that of a saved model"
    if folder.is_dir():
        try:
            names = {path.name for path in folder.iterdir()}
        except OSError:
            raise ConfigError(where, f"{folder} cannot be read", allowed) from None
        for name in sorted(names - OWN if _is_saved_model(folder) else names):
            raise ConfigError(where, f"{folder} holds {name}, which would be lost", allowed)
    elif os.path.lexists(folder):
        raise ConfigError(where, f"{folder} is not a directory", allowed)
    parent = folder.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(where, f"{parent} cannot be written to", "a writable folder")


def _is_saved_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return isinstance(config, dict) and config.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        return False


def _read_config(folder: Path) -> Config:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder}: no artifact here (there is no config.json)") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from None
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{path}: format {version!r}; this version reads format {FORMAT}")
    if config.pop("digest", None) != _digest_of_config(config):
        raise ArtifactError(f"{path}: changed since it was saved (its digest says so)")
    with misfits_in(path):
        read = Config.read(config)
        for index, task in enumerate(read.tasks):
            check_task_name(task, read.tasks[:index])
    return read


def _digest_of_config(config: Mapping[str, object]) -> str:
    """SHA-256 of config.json's content but for this digest, however it is laid out."""
    return _digest(json.dumps(config, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _edits_file(task: str) -> str:
    return f"interventions/{task}.safetensors"


def _save(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    # safetensors refuses tensors that share memory
    separate = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        save_file(separate, path, header)
    except SafetensorError as error:  # a full disk comes as one
        raise OSError(str(error)) from None


# -- edits in fewer bytes --------------------------------------------------------------------------


def pack(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Tensors as a file holds them.

    With ``int8`` a row x becomes round(x / s), s = max |x| / 127, and its scale s, which stands
    under the tensor's name with ``.scale`` behind it; a vector is one row. s is rounded up to 16
    binary digits, so that s times a whole number is exact: packing what was unpacked changes
    nothing.

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
    """The tensors that ``pack`` was given, rounded, in float32.

    Raises:
        ValueError: a scale is missing, or does not fit.
    """
    tensors = {}
    for name, tensor in packed.items():
        if tensor.dtype == torch.int8:
            scale = packed.get(name + SCALE)
            if scale is None or scale.shape != (*tensor.shape[:-1], 1):
                raise ValueError(f"{name} has no scale per row")
            tensor = tensor * scale
        if not name.endswith(SCALE):
            tensors[name] = tensor.float()
    return tensors


def size(tensors: Mapping[str, Tensor], storage: Storage) -> int:
    """Bytes of the packed tensors."""
    return sum(t.numel() * t.element_size() for t in pack(tensors, storage).values())


def _coarse(scale: Tensor) -> Tensor:
    """Positive float32 numbers rounded up to 16 binary digits."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFF) & ~0xFF).view(torch.float32)
