"""The model card of a saved model: what a hub indexes, and what a reader asks first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from ..results import in_words
from .hub import is_hub_id

if TYPE_CHECKING:
    from .model import InterventionModel

LIBRARY = "fusion-bench-intervmerge"
TAGS = ["intervmerge", "fusion-bench", "model-merging"]


def model_card(model: InterventionModel, name: str) -> str:
    """The card as Markdown behind its metadata.

    Args:
        model: its ``metadata`` may tell ``images`` (what the edits were found on),
            ``transductive``, ``base_model`` and ``results`` (task -> accuracy on the test split).
        name: what ``from_pretrained`` takes: a folder or a hub's id.
    """
    known, equal = model.metadata, model.unequal_ranks() is None
    settings = "\n".join(
        f"| {site} | {config.function} | {config.rank if equal else 'by place'} "
        f"| {config.blocks} | {config.tokens} | {config.part} |"
        for site, config in model.interventions.items()
    )
    extra = model.extra_parameters()
    example = model.tasks[0] if model.tasks else "..."
    return f"""---
{_data(model, name).to_yaml()}
---

# {name}

A merged {model.tower.title} vision encoder with task-specific interventions
([IntervMerge](https://arxiv.org/abs/2412.17023)) for {len(model.tasks)} tasks:
{", ".join(model.tasks)}.
{_trained(known)}
{extra["total"]:,} extra parameters over all tasks ({extra["folded"]:,} when folded).

| site | function | rank | blocks | tokens | part |
|---|---|---|---|---|---|
{settings}

```python
from fusion_bench_intervmerge import InterventionModel

model = InterventionModel.from_pretrained("{name}")
features = model.encode(images, task="{example}")
```
{_results(known)}"""


def _data(model: InterventionModel, name: str) -> ModelCardData:
    known = model.metadata
    base = known.get("base_model")
    # A folder of this machine is no model that a hub knows.
    known_to_hubs = isinstance(base, str) and is_hub_id(base) and not Path(base).exists()
    results = [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=task,
            dataset_name=task,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=accuracy,
        )
        for task, accuracy in (known.get("results") or {}).items()
    ]
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=model.tower.hub_task,
        tags=[*TAGS, model.tower.title.lower()],
        base_model=base if known_to_hubs else None,
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )


def _trained(known: dict[str, Any]) -> str:
    if not known.get("images"):
        return ""
    kind = {
        True: " These include images that it is tested on, without labels: its test results are "
        "transductive.",
        False: " Its test results are held-out: none of these is a test image.",
    }.get(known.get("transductive"), "")  # type: ignore[arg-type]
    return f"\nIts edits were found on {in_words(known['images'])}.{kind}\n"


def _results(known: dict[str, Any]) -> str:
    results = known.get("results") or {}
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
