"""What the methods write of their models: results, and the diagnosis on the screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..config import Json
from ..model.model import InterventionModel
from ..results import ImagesUsed, Result

# -- results ---------------------------------------------------------------------------------------


def repair_result(
    model: InterventionModel, settings: Json, images: list[ImagesUsed], **more: object
) -> Result:
    """The result of a repaired model.

    Args:
        model: the model.
        settings: its method's, as plain values.
        images: what its edits were found on.
        more: other fields of ``Result``.
    """
    extra, budget = model.extra_parameters(), settings.get("budget")
    edits = [model.edits_of(task) for task in model.tasks]
    ranks = {r for own in edits for at in own.ranks().values() for r in at.values()}
    known: Json = {
        "budget": budget,
        "rank": ranks.pop() if budget is None and len(ranks) == 1 else None,
        "settings": dict(settings),
        "extra_parameters": extra["total"],
        "extra_parameters_folded": extra["folded"],
        "extra_parameters_by_task": extra["per_task"],
        "bytes": extra["bytes"] + 4 * extra.get("router", 0),
        "labels": 0,
        "passes": 1.0,
        "needs_task": model.router is None,
        "images": images,
    }
    return Result(kind="repair", **known | more)


def saved_result(model: InterventionModel, base: str, method: str) -> Result:
    """The result of a saved model, as far as it tells.

    Args:
        model: the model.
        base, method: what to call its merge and its repair.
    """
    settings, images = model.metadata.get("method") or {}, saved_images(model)
    return repair_result(model, settings, images, seed=model.seed, base=base, method=method)


def saved_images(model: InterventionModel) -> list[ImagesUsed]:
    """The images that a saved model's edits were found on, as far as it tells."""
    known = model.metadata.get("images")
    # a sentence stands for images that are not known, of a model that was made in Python
    told = [one for one in known if not isinstance(one, str)] if isinstance(known, list) else []
    return [ImagesUsed.read(one, "images") for one in told]


def method_name(result: Result) -> str:
    """The method's name on the command line, with its size: ``intervmerge_r4``."""
    name = hydra_choices().get("method", "intervmerge").replace("/", "_")
    if result.budget is not None:
        return f"{name}_b{result.budget}"
    return name if result.rank is None else f"{name}_r{result.rank}"


def base_name(base: object) -> str:
    """A base method's name on the command line; in Python, the name of its class."""
    if chosen := hydra_choices().get("method@method.base"):
        return chosen.replace("/", "_")
    named = base.get("_target_") or base.get("name") if isinstance(base, Mapping) else None
    return str(named or type(base).__name__).rpartition(".")[2]


def fitting_task_pool(tasks: Sequence[str], pretrained: object) -> str:
    """The name of a task pool that evaluates a model pool's models.

    Args:
        tasks: the model pool's.
        pretrained: its config of the pretrained model, which tells the architecture.

    Returns:
        ``...`` if none is known.
    """
    chosen = hydra_choices().get("modelpool", "/")
    if "/" not in chosen:
        return chosen  # each of this package's pools has a task pool of its name
    sizes = {"base-patch32": "b32", "base-patch16": "b16", "large-patch14": "l14"}
    sizes |= {"ViT-B-32": "b32", "ViT-B-16": "b16", "ViT-L-14": "l14"}
    size = next((short for name, short in sizes.items() if name in f"{pretrained} {chosen}"), None)
    if size is None:
        return "..."
    family = "openclip" if "OpenCLIP" in chosen else "clip"
    many = 8 if family == "openclip" or len(tasks) <= 8 else 14 if len(tasks) <= 14 else 20
    return f"{family}-vit-{size}_{'TA8' if many == 8 else f'TALL{many}'}"


def hydra_choices() -> dict[str, str]:
    """Which config of each group was chosen; empty if Hydra composed none."""
    if not HydraConfig.initialized():
        return {}
    return {key: str(name) for key, name in HydraConfig.get().runtime.choices.items() if name}


# -- diagnosis -------------------------------------------------------------------------------------

ENCODERS = {"before": "merged", "after": "repaired"}


@torch.no_grad()
def diagnose(
    model: InterventionModel,
    task: str,
    dataset: Dataset[Any],
    indices: list[int],
    expert: Tensor,
    head: Callable[[Tensor], Tensor] | None,
) -> dict[str, float]:
    """One task's representation bias, and its agreement with the expert's predictions.

    Args:
        model: the trained model.
        task: the task.
        dataset: items (pixel values, ...).
        indices: which images to look at.
        expert: the expert's image features of these images, (images, projection_dim).
        head: zero-shot logits of image features; without one, agreement is left out.

    Returns:
        ``bias_before`` and ``bias_after``, the mean L1 of image features to the expert's, and with
        a head ``agreement_before`` and ``agreement_after``, the share of images on which the
        predicted class is the expert's.
    """
    features: dict[str, list[Tensor]] = {when: [] for when in ENCODERS}
    for batch in DataLoader(Subset(dataset, indices), batch_size=64):
        images = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(model.device)
        features["before"].append(model.encode(images).float().cpu())
        features["after"].append(model.encode(images, task).float().cpu())
    row = {}
    for when, parts in features.items():
        own = torch.cat(parts)
        row[f"bias_{when}"] = float((own - expert).abs().mean())
        if head is not None:
            same = head(own).argmax(dim=-1) == head(expert).argmax(dim=-1)
            row[f"agreement_{when}"] = float(same.float().mean())
    return row


def diagnosis_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """The tasks' diagnosis as a table for the terminal."""
    numbers = pd.DataFrame.from_dict(rows, orient="index")
    table = Table("task")
    for name in numbers:
        what, _, when = str(name).partition("_")
        table.add_column(f"{what}, {ENCODERS[when]}", justify="right")
    numbers.loc["average"] = numbers.mean()
    for task, row in numbers.iterrows():
        forms = ("{:.4f}" if name.startswith("bias") else "{:.1%}" for name in numbers)
        cells = ["-" if np.isnan(n) else form.format(n) for form, n in zip(forms, row, strict=True)]
        table.add_row(task, *cells, end_section=task == list(rows)[-1])
    return table
