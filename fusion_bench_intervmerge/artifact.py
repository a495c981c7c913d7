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
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoders import VisionTower, tower_from_spec
from .files import whole_folder
from .interventions import InterventionConfig, read_interventions
from .interventions.functions.base import Orthonormal

FORMAT = 2
READABLE = (1, 2)  # 1 held, instead of R, what R is computed from


class ArtifactError(ValueError):
    """A folder that is no artifact, or one whose files do not belong together."""


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
    """

    tower: VisionTower
    interventions: Mapping[str, InterventionConfig]
    seed: int
    edits: Mapping[str, Mapping[str, Tensor]]
    ranks: Mapping[str, Mapping[str, Mapping[int, int]]] | None = None
    extra_parameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.edits)


def write(artifact: Artifact, folder: Path) -> None:
    """Write an artifact to a folder; a finished folder of that name is replaced as a whole.

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
            "ranks": artifact.ranks,
            "merged_digest": artifact.tower.digest(),
            "metadata": metadata,
        }
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "README.md").write_text(_card(artifact, folder.name))


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
    if config["format"] == 1:
        edits = {task: _from_format_1(tensors) for task, tensors in edits.items()}
    metadata = dict(config.get("metadata", {}))
    if (folder / "coefficients.safetensors").exists():
        metadata["coefficients"] = _read(folder / "coefficients.safetensors")
    ranks = config.get("ranks")
    return Artifact(tower, interventions, seed, edits, ranks, metadata=metadata)


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
    if not isinstance(config, dict) or config.get("format") not in READABLE:
        found = config.get("format") if isinstance(config, dict) else None
        known = " and ".join(map(str, READABLE))
        raise ArtifactError(f"{path}: format {found!r}; this version reads formats {known}")
    return config


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: torn or no safetensors file ({error})") from None


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


def _card(artifact: Artifact, name: str) -> str:
    settings = "\n".join(
        f"| {site} | {config.function} | {config.rank} | {config.blocks} | {config.tokens} "
        f"| {config.part} |"
        for site, config in artifact.interventions.items()
    )
    images, extra = artifact.metadata.get("images"), artifact.extra_parameters
    trained = f"\nTrained on {images}.\n" if images else ""
    example = artifact.tasks[0] if artifact.tasks else "..."
    return f"""# {name}

A merged CLIP vision encoder with task-specific interventions
([IntervMerge](https://arxiv.org/abs/2412.17023)) for {len(artifact.tasks)} tasks:
{", ".join(artifact.tasks)}.
{trained}
{extra["total"]:,} extra parameters over all tasks ({extra["folded"]:,} when folded).

| site | function | rank | blocks | tokens | part |
|---|---|---|---|---|---|
{settings}

```python
from fusion_bench_intervmerge import InterventionModel

model = InterventionModel.from_pretrained("{name}")
features = model.encode(images, task="{example}")
```
"""
