"""How far the merged encoder is from the experts, before and after: no labels needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..model.model import InterventionModel

ENCODERS = {"before": "merged", "after": "repaired"}


@torch.no_grad()
def diagnose(
    model: InterventionModel,
    task: str,
    dataset: Dataset,
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
    found = {}
    for when, parts in features.items():
        own = torch.cat(parts)
        found[f"bias_{when}"] = float((own - expert).abs().mean())
        if head is not None:
            same = head(own).argmax(dim=-1) == head(expert).argmax(dim=-1)
            found[f"agreement_{when}"] = float(same.float().mean())
    return found


def table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """The tasks' diagnosis as a table for the terminal."""
    numbers = pd.DataFrame.from_dict(rows, orient="index")
    shown = Table("task")
    for name in numbers:
        what, _, when = str(name).partition("_")
        shown.add_column(f"{what}, {ENCODERS[when]}", justify="right")
    numbers.loc["average"] = numbers.mean()
    for task, row in numbers.iterrows():
        forms = ("{:.4f}" if name.startswith("bias") else "{:.1%}" for name in numbers)
        cells = ["-" if np.isnan(n) else form.format(n) for form, n in zip(forms, row, strict=True)]
        shown.add_row(task, *cells, end_section=task == list(rows)[-1])
    return shown
