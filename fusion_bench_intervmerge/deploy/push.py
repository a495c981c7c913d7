"""A saved model on a hub, with what others need to run it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from ..config import ConfigError
from ..model.hub import hub_errors, is_hub_id
from ..model.model import InterventionModel
from .clip import image_processor
from .export import Tell, export, log
from .heads import known_heads


def push(
    model: InterventionModel,
    repo: str,
    *,
    onnx: bool = True,
    dtype: str = "fp32",
    private: bool | None = None,
    tell: Tell = log.info,
) -> str:
    """Put a model on the hub: its artifact, its image processor, and ``onnx/model.onnx``.

    The graph gives logits if the model knows its tasks' classes and its CLIP.

    Args:
        model: it is not changed.
        repo: ``owner/model``; it is created if it does not exist.
        onnx: whether to export a graph.
        dtype: of the graph's weights.
        private: whether a new repository is private; None for the owner's default.
        tell: called with what is being done.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: a bad repository name, or what ``export`` raises.
        ArtifactError: the hub refuses, or is not reached.
    """
    if not is_hub_id(repo):
        raise ConfigError("repo", f"{repo!r} cannot name a repository", "owner/model")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder, model_card_kwargs={"name": repo})
        image_processor(model).save_pretrained(folder)
        if onnx:
            heads, classes = None, None
            if model.metadata.get("classes") and model.metadata.get("base_model"):
                heads, classes = known_heads(model)
            file = folder / "onnx" / "model.onnx"
            export(model, file, dtype=dtype, heads=heads, classes=classes, tell=tell)
        tell("uploading the files")
        with hub_errors(f"{repo}: not pushed"):
            hub = HfApi()
            hub.create_repo(repo, private=private, exist_ok=True)
            commit = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="The model")
    return str(commit.commit_url)


def read_results(run: Path, tasks: Sequence[str]) -> dict[str, float]:
    """A run's accuracy per task, from FusionBench's report.

    Raises:
        ConfigError: there is no report, or one without these tasks.
    """
    try:
        report = json.loads((run / "program_report.json").read_text(encoding="utf-8"))
        return {task: float(report[task]["accuracy"]) for task in tasks}
    except OSError:
        problem = "there is no program_report.json"
    except KeyError as error:
        problem = f"its program_report.json lacks {error}"
    except (ValueError, TypeError):
        problem = "its program_report.json holds no accuracies"
    raise ConfigError(f"--run {run}", problem, "the folder of a run that was evaluated")
