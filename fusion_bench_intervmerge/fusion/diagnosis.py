"""How far the merged encoder is from the experts, before and after: no labels needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..model import InterventionModel


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
    features: dict[str, list[Tensor]] = {"before": [], "after": []}
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
    agreement = any("agreement_after" in row for row in rows.values())
    shown = Table()
    shown.add_column("task")
    headers = ["bias, merged", "bias, repaired"]
    headers += ["agreement, merged", "agreement, repaired"] if agreement else []
    for header in headers:
        shown.add_column(header, justify="right")
    names = dict.fromkeys(name for row in rows.values() for name in row)
    known = {name: [row[name] for row in rows.values() if name in row] for name in names}
    average = {name: sum(values) / len(values) for name, values in known.items()}
    for task, row in [*rows.items(), ("average", average)]:
        cells = [f"{row['bias_before']:.4f}", f"{row['bias_after']:.4f}"]
        if agreement:
            shares = (row.get(f"agreement_{when}") for when in ("before", "after"))
            cells += ["-" if share is None else f"{share:.1%}" for share in shares]
        shown.add_row(task, *cells, end_section=task == list(rows)[-1])
    return shown
