"""Zero-shot heads: class names turned into the matrices that give logits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ConfigError, Json, Settings
from ..model.model import InterventionModel
from .clip import from_base, load_clip

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

FORM = '{"task": {"names": ["cat", ...], "templates": ["a photo of a {}.", ...]}, ...}'


def _has_one_gap(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("a template needs {} once, where the class's name goes")
    return template


class Classes(Settings):
    """A task's classes: their names, and captions with ``{}`` for a name."""

    names: Annotated[list[str], Field(min_length=1)]
    templates: Annotated[list[Annotated[str, AfterValidator(_has_one_gap)]], Field(min_length=1)]

    def captions(self) -> list[list[str]]:
        """Of each class."""
        return [[text.replace("{}", name) for text in self.templates] for name in self.names]


def read_classes(file: str | Path) -> Json:
    """The classes of tasks from a JSON file; ``known_heads`` checks them.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
    """
    try:
        classes = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--classes {file}", f"not readable as JSON ({error})", FORM) from None
    if not isinstance(classes, dict):
        raise ConfigError(f"--classes {file}", "not a mapping", FORM)
    return classes


def known_heads(
    model: InterventionModel,
    tasks: Sequence[str] | None = None,
    classes: Mapping[str, object] | None = None,
    clip: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Zero-shot heads of a model's tasks, and the names of their classes.

    A head is (classes, projection_dim); logits are its product with normalised image features.

    Args:
        model: its metadata has what is not given.
        tasks: by default all of the model's.
        classes: task -> ``{"names": [...], "templates": ["a photo of a {}.", ...]}``.
        clip: as ``to_clip_model`` takes it.

    Raises:
        ConfigError: no classes are known for a task, or they do not fit, or no CLIP is known.
    """
    from transformers import AutoTokenizer

    classes = (model.metadata.get("classes") or {}) if classes is None else classes
    by_task = {}
    for task in tasks or model.tasks:
        if task not in classes:
            raise ConfigError(f"classes.{task}", "none are known", f"--classes FILE with {FORM}")
        by_task[task] = Classes.read(classes[task], f"classes.{task}")
    tokenizer = from_base(AutoTokenizer.from_pretrained, model, clip)
    whole = load_clip(model, clip)
    scale = whole.logit_scale.detach().exp()
    heads = {
        task: scale * zero_shot_head(whole, tokenizer, described.captions())
        for task, described in by_task.items()
    }
    return heads, {task: described.names for task, described in by_task.items()}


@torch.no_grad()
def zero_shot_head(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, captions: Sequence[Sequence[str]]
) -> Tensor:
    """A task's classes as text features: section 3.1.4 of arXiv 2103.00020.

    Args:
        clip: Hugging Face's ``CLIPModel``.
        tokenizer: its tokenizer.
        captions: of each class.

    Returns:
        (classes, projection_dim): per class the mean of its captions' normalised features,
        normalised again.
    """
    rows = []
    for texts in captions:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        features = clip.get_text_features(**tokens.to(clip.device))
        rows.append(F.normalize(features, dim=-1).mean(dim=0))
    return F.normalize(torch.stack(rows), dim=-1)


class Heads(nn.Module):
    """The heads of several tasks: image features (batch, projection_dim) -> logits, fp32.

    Logits are (batch, classes of the task that has most), minus infinity behind a task's own
    classes.

    Args:
        heads: for each task (classes, projection_dim).
    """

    def __init__(self, heads: Sequence[Tensor]):
        super().__init__()
        most = max(map(len, heads))
        padded = [F.pad(head.float(), (0, 0, 0, most - len(head))) for head in heads]
        missing = [torch.arange(most) >= len(head) for head in heads]
        self.register_buffer("weights", torch.stack(padded))
        self.register_buffer("missing", torch.stack(missing))

    def forward(self, features: Tensor, task: Tensor) -> Tensor:
        """Logits; ``task`` (batch,) is each image's index among the heads."""
        weights, missing = (
            self.get_buffer(n).index_select(0, task) for n in ("weights", "missing")
        )
        direction = F.normalize(features.float(), dim=-1)
        logits = (weights @ direction.unsqueeze(-1)).squeeze(-1)
        return logits.masked_fill(missing, float("-inf"))
