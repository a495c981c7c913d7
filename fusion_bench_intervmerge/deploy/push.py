"""A saved model on a hub, with what others need to run it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..config import ConfigError
from ..model.hub import is_hub_id, one_line
from ..model.model import InterventionModel
from .clip import image_processor
from .command import known_heads
from .export import export


def push(
    model: InterventionModel,
    repo: str,
    *,
    onnx: bool = True,
    dtype: str = "fp32",
    private: bool | None = None,
) -> str:
    """Put a model on the hub: its artifact, its image processor, and an ONNX graph.

    The graph is ``onnx/model.onnx``, with logits where the model knows its tasks' classes and its
    CLIP.

    Args:
        model: it is not changed.
        repo: ``owner/model``; it is made where it is missing.
        onnx: whether to export a graph.
        dtype: of the graph's weights.
        private: whether a new repository is private; the owner's default where None.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: a name that is no repository's, or what ``export`` raises.
        ArtifactError: the hub refuses, or is not reached.
    """
    if not is_hub_id(repo):
        raise ConfigError("repo", f"{repo!r} is no repository's name", "owner/model")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder, model_card_kwargs={"name": repo})
        image_processor(model).save_pretrained(folder)
        if onnx:
            heads, names = None, None
            if model.metadata.get("classes") and model.metadata.get("base_model"):
                heads, names = known_heads(model)
            export(model, folder / "onnx" / "model.onnx", dtype=dtype, heads=heads, classes=names)
        with one_line(f"{repo}: not pushed"):
            hub = HfApi()
            hub.create_repo(repo, private=private, exist_ok=True)
            commit = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="The model")
    return str(commit.commit_url)


def read_results(run: Path, tasks: list[str]) -> dict[str, float]:
    """Accuracies of a run by task, as FusionBench's report has them.

    Raises:
        ConfigError: no report there, or one without these tasks.
    """
    file = run / "program_report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return {task: float(report[task]["accuracy"]) for task in tasks}
    except OSError:
        problem = "no program_report.json there"
    except (ValueError, TypeError):
        problem = "its program_report.json is no report of accuracies"
    except KeyError as error:
        problem = f"its program_report.json lacks {error}"
    raise ConfigError(f"--run {run}", problem, "the folder of a run that was evaluated")
