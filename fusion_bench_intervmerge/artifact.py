"""A saved model: plain files that any tool can read, and nothing is ever unpickled.

::

    config.json                       format version, tower, tasks, interventions, and a SHA-256 of
                                      its own content and of every other file but the model card
    interventions/<task>.safetensors  a task's edits: <site>.<block>.<tensor>
    coefficients.safetensors          merging coefficients, when they were trained
    router.safetensors                what tells the task of an image, if anything does
    merged/model.safetensors          the merged encoder, under its family's usual names
    README.md                         a model card
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoders import VisionTower, tower_from_spec
from .errors import ArtifactError, ConfigError
from .files import opened_folder, whole_folder
from .hub.card import model_card
from .interventions import InterventionConfig, read_interventions
from .interventions.functions.base import Orthonormal
from .routing import Router, read_router
from .schema import Json, Strict, checked
from .storage import Storage, pack, unpack
from .task_names import check_task_name

FORMAT = 2
READABLE = (1, 2)  # 1 held, instead of R, what R is computed from, and no digests of the files
MERGED = "merged/model.safetensors"
MERGED_CONFIG = "merged/config.json"
COEFFICIENTS = "coefficients.safetensors"
ROUTER = "router.safetensors"
_MEANT = {MERGED: "the weights that the edits were trained on"}


# Settings in a file may be of any kind; what they break is the file's fault, in one line.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Artifact:
    """What a saved model consists of.

    Attributes:
        tower: the merged encoder.
        interventions: site -> settings.
        seed: where the edits' starting values came from.
        edits: task -> its edits' tensors, named ``<site>.<block>.<tensor>``.
        ranks: task -> site -> block -> rank of the edit there, where they are not all as the
            settings say; no edit where nothing is named.
        extra_parameters: how many numbers the edits are, as trained and ``folded``.
        metadata: JSON values; tensors under ``coefficients``.
        router: what tells the task of an image, if anything does.
        storage: how the edits' tensors are stored.
    """

    tower: VisionTower
    interventions: Mapping[str, InterventionConfig]
    seed: int
    edits: Mapping[str, Mapping[str, Tensor]]
    ranks: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None
    extra_parameters: Mapping[str, object] = field(default_factory=dict)
    metadata: Json = field(default_factory=dict)
    router: Router | None = None
    storage: Storage = "float32"

    @property
    def tasks(self) -> list[str]:
        return list(self.edits)


def write(artifact: Artifact, folder: Path, card_name: str | None = None) -> None:
    """Write an artifact to a folder; a saved model of that name is replaced as a whole.

    Args:
        artifact: what to write.
        folder: where to.
        card_name: what the model card calls it, the folder's name where None.

    Raises:
        ConfigError: the folder cannot be written to, or holds what is no saved model.
    """
    check_place(folder, str(folder))
    with whole_folder(folder, partial(check_place, folder, str(folder))) as temporary:
        (temporary / "merged").mkdir()
        (temporary / "interventions").mkdir()
        _save(artifact.tower.weights(), temporary / MERGED, {"format": "pt"})
        if (config := artifact.tower.library_config()) is not None:
            (temporary / MERGED_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for task, edits in artifact.edits.items():
            _save(pack(edits, artifact.storage), temporary / _edits_file(task))
        metadata = dict(artifact.metadata)
        coefficients = metadata.pop("coefficients", None)
        if coefficients is not None:
            _save(coefficients, temporary / COEFFICIENTS)
        if artifact.router is not None:
            _save(artifact.router.tensors(), temporary / ROUTER)
        config = {
            "format": FORMAT,
            "tower": artifact.tower.spec(),
            "tasks": artifact.tasks,
            "interventions": {s: c.to_dict() for s, c in artifact.interventions.items()},
            "seed": artifact.seed,
            "ranks": artifact.ranks,
            "metadata": metadata,
            # left out where there is none: earlier versions know no such key
            **({} if artifact.router is None else {"router": artifact.router.config()}),
            **({} if artifact.storage == "float32" else {"storage": artifact.storage}),
            "files": {
                file.relative_to(temporary).as_posix(): _digest_of_file(file)
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            },
        }
        config = json.loads(json.dumps(config))  # as it will be read: tuples are lists
        config["digest"] = _digest_of_config(config)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        card = model_card(artifact, card_name or folder.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def read(folder: Path) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: a file is missing, torn, of another format, or does not fit the others.
    """
    try:
        with opened_folder(folder) as opened:
            return _read(_Files(folder, opened, _read_config(folder, opened)))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder}: no artifact here (there is no config.json)") from None
    except OSError as error:
        raise ArtifactError(f"{folder}: not readable ({error.strerror or error})") from None
    except MISFITS as error:
        raise misfit(folder, error) from None


def misfit(folder: str | Path, error: Exception) -> ArtifactError:
    """What the encoder, or an edit, has against the settings in a file, in one line."""
    if isinstance(error, ArtifactError):
        return error
    said = str(error).splitlines() or [type(error).__name__]
    return ArtifactError(f"{folder}: {said[0]}")


def check_place(folder: Path, where: str) -> None:
    """Raise unless a model may be saved in a folder: nothing but a saved model may be replaced.

    Args:
        folder: absent, empty, or a saved model and nothing else.
        where: config key to name in errors.

    Raises:
        ConfigError: what is in the way, in one line.
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
    """What belongs to the saved model in a folder; nothing where there is no saved model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] in READABLE and isinstance(config["interventions"], dict):
            files = ["config.json", "README.md", *_files_of(config["tasks"])]
            return {"merged", "interventions", *files}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return set()


# -- what config.json says -------------------------------------------------------------------------


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Config(Strict):
    """config.json, its settings yet to be tried on the encoder."""

    format: int
    tower: Json
    tasks: list[str]
    interventions: dict[str, Json]
    seed: int
    ranks: dict[str, dict[str, dict[str, Annotated[int, Field(ge=1)]]]] | None = None
    metadata: Json = Field(default_factory=dict)


class _Config1(_Config):
    merged_digest: str


class _Config2(_Config):
    files: dict[str, Digest]
    router: Json | None = None
    storage: Storage = "float32"
    digest: Digest


def _read_config(folder: Path, opened: Path) -> _Config1 | _Config2:
    path = folder / "config.json"
    try:
        config = json.loads((opened / "config.json").read_text(encoding="utf-8"))
        found = config.get("format") if isinstance(config, dict) else None
        if isinstance(found, bool) or found not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ArtifactError(f"{path}: format {found!r}; this version reads formats {known}")
        said = config.pop("digest", None) if found == FORMAT else None
        if found == FORMAT and said != _digest_of_config(config):
            raise ArtifactError(f"{path}: changed since it was saved (its digest says so)")
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from None
    try:
        read = (
            checked(_Config1, config)
            if found == 1
            else checked(_Config2, config | {"digest": said})
        )
        for index, task in enumerate(read.tasks):
            check_task_name(task, read.tasks[:index])
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return read


@dataclass
class _Files:
    """An artifact's files, each checked against config.json before it is used.

    Attributes:
        folder: its name, for errors.
        opened: where to read, which stays the same folder when another model is saved meanwhile.
        config: what it should hold.
    """

    folder: Path
    opened: Path
    config: _Config1 | _Config2

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A file's tensors."""
        path = self.checked(name)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ArtifactError(
                f"{self.folder / name}: torn or no safetensors file ({error})"
            ) from None

    def checked(self, name: str) -> Path:
        """Where a file is that has the digest it should have."""
        path = self.opened / name
        try:
            if not path.is_file():
                raise FileNotFoundError
            if isinstance(self.config, _Config2):
                said = self.config.files.get(name)
                if said is None:
                    raise ArtifactError(f"{self.folder / 'config.json'}: files: {name} is missing")
                if said != _digest_of_file(path):
                    meant = f", not {_MEANT[name]}" if name in _MEANT else ""
                    raise ArtifactError(
                        f"{self.folder / name}: torn or another file{meant} "
                        "(its digest differs from config.json's)"
                    )
            return path
        except FileNotFoundError:
            raise ArtifactError(f"{self.folder / name}: missing") from None
        except OSError as error:
            reason = error.strerror or error
            raise ArtifactError(f"{self.folder / name}: not readable ({reason})") from None

    def has_coefficients(self) -> bool:
        if isinstance(self.config, _Config2):
            return COEFFICIENTS in self.config.files
        return (self.opened / COEFFICIENTS).exists()


def _read(files: _Files) -> Artifact:
    config = files.config
    interventions = read_interventions(config.interventions)
    weights = files.tensors(MERGED)
    with torch.device("meta"):  # no memory is taken before the sizes are known to fit
        plan = tower_from_spec(config.tower)
        plan.load_weights({name: torch.empty_like(t, device="meta") for name, t in weights.items()})
    tower = tower_from_spec(config.tower)
    tower.load_weights(weights)
    if isinstance(config, _Config2):
        for name in config.files:
            if name not in _files_of(config.tasks):
                raise ArtifactError(
                    f"{files.folder / 'config.json'}: files: unknown: {name[:60]!r}"
                )
        if MERGED_CONFIG in config.files:
            files.checked(MERGED_CONFIG)
    if isinstance(config, _Config1) and tower.digest() != config.merged_digest:
        raise ArtifactError(
            f"{files.folder / MERGED}: not {_MEANT[MERGED]} (its digest differs from config.json's)"
        )
    edits = {task: files.tensors(_edits_file(task)) for task in config.tasks}
    if isinstance(config, _Config1):
        edits = {task: _from_format_1(tensors) for task, tensors in edits.items()}
    metadata = dict(config.metadata)
    if files.has_coefficients():
        metadata["coefficients"] = files.tensors(COEFFICIENTS)
    router = None
    if isinstance(config, _Config2) and config.router is not None:
        router = _read_router(files, config)
    storage = config.storage if isinstance(config, _Config2) else "float32"
    if storage != "float32":
        edits = {task: unpack(tensors) for task, tensors in edits.items()}
    return Artifact(
        tower,
        interventions,
        config.seed,
        edits,
        config.ranks,
        metadata=metadata,
        router=router,
        storage=storage,
    )


def _read_router(files: _Files, config: _Config2) -> Router:
    tensors = files.tensors(ROUTER)
    try:
        return read_router(config.router or {}, tensors, config.tasks)
    except MISFITS as error:
        raise misfit(files.folder / ROUTER, error) from None


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


def _from_format_1(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An edit's tensors by the names of its formula."""
    kept = re.compile(r"(.*\.)parametrizations\.(R)\.original")
    named = {}
    for name, tensor in tensors.items():
        if match := kept.fullmatch(name):
            # a copy: rounding depends on how the memory is aligned, which in files is by chance
            named["".join(match.groups())] = Orthonormal()(tensor.clone())
        else:
            named[name] = tensor
    return named


def _save(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    # safetensors refuses tensors that share memory
    separate = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        save_file(separate, path, header)
    except SafetensorError as error:  # a full disk comes as one
        raise OSError(str(error)) from None
