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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .encoders import tower_from_spec
from .files import whole_folder

if TYPE_CHECKING:
    from .model import InterventionModel

FORMAT = 1


class ArtifactError(ValueError):
    """A folder that is no artifact, or one whose files do not belong together."""


def save(model: InterventionModel, folder: Path) -> None:
    """Write a model to a folder; a finished folder of that name is replaced as a whole.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    with whole_folder(folder) as temporary:
        (temporary / "merged").mkdir()
        (temporary / "interventions").mkdir()
        weights = _for_file(model.tower.weights())
        save_file(weights, temporary / "merged" / "model.safetensors", metadata={"format": "pt"})
        _write_stock_config(model, temporary / "merged")
        for task in model.tasks:
            save_file(
                _for_file(model.edits[task].state_dict()),
                temporary / "interventions" / f"{task}.safetensors",
            )
        coefficients = model.metadata.get("coefficients")
        if coefficients is not None:
            save_file(_for_file(coefficients), temporary / "coefficients.safetensors")
        config = {
            "format": FORMAT,
            "tower": model.tower.spec(),
            "tasks": model.tasks,
            "interventions": {s: c.to_dict() for s, c in model.interventions.items()},
            "seed": model.seed,
            "merged_digest": model.tower.digest(),
            "metadata": {k: v for k, v in model.metadata.items() if k != "coefficients"},
        }
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "README.md").write_text(_card(model, folder.name))


def load(folder: Path) -> InterventionModel:
    """Read a model.

    Raises:
        ArtifactError: a file is missing, torn, of another format, or does not fit the others.
    """
    from .model import InterventionModel

    config = read_config(folder)
    try:
        tower = tower_from_spec(config["tower"])
        tower.load_weights(_read(folder / "merged" / "model.safetensors"))
        if tower.digest() != config["merged_digest"]:
            raise ArtifactError(
                f"{folder / 'merged'}: these are not the weights that the edits were trained on "
                "(their digest differs from config.json's)"
            )
        model = InterventionModel(tower, config["tasks"], config["interventions"], config["seed"])
    except KeyError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error} is missing") from None
    except ArtifactError:
        raise
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: {error}") from None
    for task in model.tasks:
        path = folder / "interventions" / f"{task}.safetensors"
        tensors, own = _read(path), model.edits[task].state_dict()
        wrong = sorted(tensors.keys() ^ own.keys())
        wrong += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
        if wrong:
            raise ArtifactError(f"{path}: {wrong[0]} does not fit config.json's interventions")
        model.edits[task].load_state_dict(tensors)
    model.metadata = dict(config.get("metadata", {}))
    if (folder / "coefficients.safetensors").exists():
        model.metadata["coefficients"] = _read(folder / "coefficients.safetensors")
    return model


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


def _for_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _write_stock_config(model: InterventionModel, folder: Path) -> None:
    """Beside a Hugging Face tower: what ``CLIPVisionModelWithProjection.from_pretrained`` reads."""
    if model.tower.family == "huggingface":
        config = {
            **model.tower.spec()["vision_config"],
            "projection_dim": model.tower.projection_dim,
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _card(model: InterventionModel, name: str) -> str:
    extra = model.extra_parameters()
    settings = "\n".join(
        f"| {site} | {config.function} | {config.rank} | {config.blocks} | {config.tokens} "
        f"| {config.part} |"
        for site, config in model.interventions.items()
    )
    images = model.metadata.get("images")
    trained = f"\nTrained on {images}.\n" if images else ""
    return f"""# {name}

A merged CLIP vision encoder with task-specific interventions
([IntervMerge](https://arxiv.org/abs/2412.17023)) for {len(model.tasks)} tasks:
{", ".join(model.tasks)}.
{trained}
{extra["total"]:,} extra parameters over all tasks ({extra["folded"]:,} when folded).

| site | function | rank | blocks | tokens | part |
|---|---|---|---|---|---|
{settings}

```python
from fusion_bench_intervmerge import InterventionModel

model = InterventionModel.from_pretrained("{name}")
features = model.encode(images, task="{model.tasks[0] if model.tasks else "..."}")
```
"""
