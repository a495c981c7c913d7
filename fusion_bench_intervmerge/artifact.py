"""A saved model: plain files that any tool can read, and nothing is ever unpickled.

::

    config.json                       format version, tower, tasks, interventions, digest
    interventions/<task>.safetensors  a task's edits: <site>.<block>.<tensor>
    coefficients.safetensors          merging coefficients, when they were trained
    merged/model.safetensors          the merged encoder, under its family's usual names
    README.md                         a model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoders import VisionTower, tower_from_spec
from .errors import ArtifactError
from .files import whole_folder
from .hub.card import model_card
from .interventions import InterventionConfig, read_interventions

FORMAT = 1


@dataclass
class Artifact:
    """What a saved model consists of.

    Attributes:
        tower: the merged encoder.
        interventions: site -> settings.
        seed: where the edits' starting values came from.
        edits: task -> its edits' tensors, named ``<site>.<block>.<tensor>``.
        extra_parameters: how many numbers the edits are, as trained and ``folded``.
        metadata: JSON values; tensors under ``coefficients``.
    """

    tower: VisionTower
    interventions: Mapping[str, InterventionConfig]
    seed: int
    edits: Mapping[str, Mapping[str, Tensor]]
    extra_parameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.edits)


def write(artifact: Artifact, folder: Path, card_name: str | None = None) -> None:
    """Write an artifact to a folder; a finished folder of that name is replaced as a whole.

    Args:
        artifact: what to write.
        folder: where to.
        card_name: what the model card calls it, the folder's name where None.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    with whole_folder(folder) as temporary:
        (temporary / "merged").mkdir()
        (temporary / "interventions").mkdir()
        weights = _for_file(artifact.tower.weights())
        save_file(weights, temporary / "merged" / "model.safetensors", metadata={"format": "pt"})
        _write_stock_config(artifact.tower, temporary / "merged")
        for task, edits in artifact.edits.items():
            save_file(_for_file(edits), temporary / "interventions" / f"{task}.safetensors")
        metadata = dict(artifact.metadata)
        coefficients = metadata.pop("coefficients", None)
        if coefficients is not None:
            save_file(_for_file(coefficients), temporary / "coefficients.safetensors")
        config = {
            "format": FORMAT,
            "tower": artifact.tower.spec(),
            "tasks": artifact.tasks,
            "interventions": {s: c.to_dict() for s, c in artifact.interventions.items()},
            "seed": artifact.seed,
            "merged_digest": artifact.tower.digest(),
            "metadata": metadata,
        }
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "README.md").write_text(model_card(artifact, card_name or folder.name))


def read(folder: Path) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: a file is missing, torn, of another format, or does not fit the others.
    """
    config = read_config(folder)
    try:
        tower = tower_from_spec(config["tower"])
        tower.load_weights(_read(folder / "merged" / "model.safetensors"))
        interventions = read_interventions(config["interventions"])
        tasks, seed, digest = config["tasks"], config["seed"], config["merged_digest"]
    except KeyError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error} is missing") from None
    except ArtifactError:
        raise
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: {error}") from None
    if tower.digest() != digest:
        raise ArtifactError(
            f"{folder / 'merged'}: these are not the weights that the edits were trained on "
            "(their digest differs from config.json's)"
        )
    edits = {task: _read(folder / "interventions" / f"{task}.safetensors") for task in tasks}
    metadata = dict(config.get("metadata", {}))
    if (folder / "coefficients.safetensors").exists():
        metadata["coefficients"] = _read(folder / "coefficients.safetensors")
    return Artifact(tower, interventions, seed, edits, metadata=metadata)


def read_config(folder: Path) -> dict[str, Any]:
    """An artifact's config.json.

    Raises:
        ArtifactError: it is missing, no JSON, or of another format.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no artifact here (there is no config.json)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ArtifactError(f"{path}: format {found!r}; this version reads format {FORMAT}")
    return config


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: torn or no safetensors file ({error})") from None


def _for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _write_stock_config(tower: VisionTower, folder: Path) -> None:
    """Beside a Hugging Face tower: what ``CLIPVisionModelWithProjection.from_pretrained`` reads."""
    if tower.family == "huggingface":
        config = {
            **tower.spec()["vision_config"],
            "projection_dim": tower.projection_dim,
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
