"""The model card of a saved model: what a hub indexes, and what a reader asks first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..config import Json
from ..results import in_words
from .artifact import Artifact
from .hub import is_hub_id

LIBRARY = "fusion-bench-intervmerge"
TAGS = ["intervmerge", "fusion-bench", "model-merging"]


def model_card(name: str, model: Artifact, extra: Mapping[str, Any]) -> str:
    """The card as Markdown behind its metadata.

    Args:
        name: what ``from_pretrained`` takes: a folder or a hub's id.
        model: its ``metadata`` may have ``images`` (what the edits were found on),
            ``transductive``, ``base_model`` and ``results`` (task -> accuracy on the test split).
        extra: the model's ``extra_parameters``.
    """
    tasks = list(model.edits)
    settings = "\n".join(
        f"| {site} | {config['function']} | {config['rank'] if model.ranks is None else 'by place'}"
        f" | {config['blocks']} | {config['tokens']} | {config['part']} |"
        for site, config in model.interventions.items()
    )
    return f"""---
{_data(name, model).to_yaml()}
---

# {name}

A merged {model.tower.title} vision encoder with task-specific interventions
([IntervMerge](https://arxiv.org/abs/2412.17023)) for {len(tasks)} tasks:
{", ".join(tasks)}.
{_images(model.metadata)}
{extra["total"]:,} extra parameters over all tasks ({extra["folded"]:,} when folded).

| site | function | rank | blocks | tokens | part |
|---|---|---|---|---|---|
{settings}

```python
from fusion_bench_intervmerge import InterventionModel

model = InterventionModel.from_pretrained("{name}")
features = model.encode(images, task="{tasks[0] if tasks else "..."}")
```
{_results(model.metadata)}"""


def _data(name: str, model: Artifact) -> ModelCardData:
    base = model.metadata.get("base_model")
    # A folder of this machine is not a model that a hub knows.
    on_a_hub = isinstance(base, str) and is_hub_id(base) and not Path(base).exists()
    results = [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=task,
            dataset_name=task,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=accuracy,
        )
        for task, accuracy in (model.metadata.get("results") or {}).items()
    ]
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=model.tower.hub_task,
        tags=[*TAGS, model.tower.title.lower()],
        base_model=base if on_a_hub else None,
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )


def _images(metadata: Json) -> str:
    if not metadata.get("images"):
        return ""
    kind = {
        True: " These include images that it is tested on, without labels: its test results are "
        "transductive.",
        False: " Its test results are held-out: none of these is a test image.",
    }.get(metadata.get("transductive", ""), "")
    return f"\nIts edits were found on {in_words(metadata['images'])}.{kind}\n"


def _results(metadata: Json) -> str:
    results = metadata.get("results") or {}
    if not results:
        return ""
    rows = "\n".join(f"| {task} | {100 * accuracy:.1f} |" for task, accuracy in results.items())
    mean = 100 * sum(results.values()) / len(results)
    return f"""
| task | accuracy on the test split, % |
|---|---:|
{rows}
| average | {mean:.1f} |
"""
