"""What each block's edit contributes: each is switched off in turn, and all others stay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from ..config import Json
from . import EXPERT, Drawing, Found
from .bias import bias

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..model.model import InterventionModel
    from ..report.style import Canvas
    from .base import TaskEncoders

PLACE = 30
_MARKERS = {"attention": "o", "mlp": "s", "block": "D", "output": "*"}
_KINDS = {  # quantity -> its title, and what it is multiplied by
    "bias": ("distance to the expert", 1),
    "agreement": ("agreement, points", 100),
    "accuracy": ("accuracy, points", 100),
}


def without_each(encoders: TaskEncoders, model: InterventionModel) -> dict[tuple[str, int], Tensor]:
    """Image features with one edit switched off.

    What comes before that edit does not change, so each network goes on from the whole model's
    states there.

    Returns:
        (site, block) -> (images, projection_dim), in the encoder's order; block is 0 at the site
        ``output``.
    """
    import torch

    from .base import finish, walk

    # where the states that an edit is the first to change are: the blocks behind them
    edits = {
        (site, block): model.tower.num_blocks if site == "output" else block
        for site, placement in model.placements.items()
        for block in placement.blocks
    }
    edits = dict(sorted(edits.items(), key=lambda edit: edit[1]))
    found: dict[tuple[str, int], list[Tensor]] = {edit: [] for edit in edits}
    with model.for_task(encoders.task):
        for images in encoders.batches(model.tower):
            for done, states in enumerate(walk(model.tower, images)):
                for place, start in edits.items():
                    if start == done:
                        with model.for_task(encoders.task, without=place):
                            found[place].append(finish(model.tower, states, start))
    return {edit: torch.cat(parts) for edit, parts in found.items()}


def measure(encoders: TaskEncoders) -> dict[str, list[Json]]:
    """The change that switching an edit off makes: value without it - value with it.

    Returns:
        Repaired model -> for each edit ``site``, ``block`` (null at the site ``output``) and the
        change of ``bias`` (of the image features), ``agreement`` and ``accuracy``, the latter two
        where logits and labels allow. An edit that helps has a positive change of bias and
        negative ones of the others.
    """
    expert = encoders.trace(EXPERT).features
    found = {}
    for name, model in encoders.models.items():
        whole = _values(encoders, encoders.trace(name).features, expert)
        found[name] = [
            {"site": site, "block": None if site == "output" else block}
            | {k: v - whole[k] for k, v in _values(encoders, features, expert).items()}
            for (site, block), features in without_each(encoders, model).items()
        ]
    return found


def _values(encoders: TaskEncoders, features: Tensor, expert: Tensor) -> dict[str, float]:
    return {"bias": bias(features, expert), **encoders.scores(features)}


def figures(found: Found) -> Iterator[Drawing]:
    """The change that each edit's absence makes, a panel a quantity."""
    edits = pd.DataFrame(
        {"task": task, "model": model, **edit}
        for task, models in found["contributions"].items()
        for model, own in models.items()
        for edit in own
    ).set_index(["model", "site", "block"])
    if edits.groupby(level=[0, 1, 2], dropna=False).size().nunique() != 1:
        raise ValueError("contributions: the tasks' edits differ")
    kinds = [kind for kind in _KINDS if kind in edits and edits[kind].notna().all()]
    yield (
        "contributions",
        "What each edit contributes",
        "The change when the edit of one block is switched off and all others stay: mean over "
        "tasks, thin bars from the lowest task to the highest. An edit helps where the "
        "distance grows, and where agreement and accuracy fall.",
        partial(_draw, edits[kinds]),
    )


def _draw(edits: pd.DataFrame, canvas: Canvas) -> Figure:
    from matplotlib.lines import Line2D

    changes = edits.groupby(level=[0, 1, 2], dropna=False, sort=False).agg(["mean", "min", "max"])
    groups = list(changes.groupby(level=[0, 1], sort=False))
    last = 2 + max(edits.index.get_level_values("block").max(), -1)  # where those of the output are
    last = 1 if pd.isna(last) else int(last)
    panels = canvas.panels(edits.shape[1], 2.5, 0.5)
    handles = []
    for panel in panels.axes:
        panel.axhline(0, color=canvas.MUTED, lw=0.8, zorder=1)
    for i, ((model, site), of_site) in enumerate(groups):
        look, several = canvas.palette[model], sum(name == model for (name, _), _ in groups) > 1
        line: Json = {"color": look.colour, "marker": _MARKERS[site], "lw": 1.3}
        line |= {"mec": canvas.SURFACE, "mew": 0.5, "ms": 10 if site == "output" else 5}
        x = of_site.index.get_level_values("block").to_numpy(float) + 1
        x = pd.Series(x).fillna(last) + 0.12 * (i - (len(groups) - 1) / 2)
        for kind, panel in zip(edits, panels.axes, strict=True):
            change = _KINDS[kind][1] * of_site[kind]
            panel.vlines(x, change["min"], change["max"], color=look.colour, lw=1, alpha=0.45)
            panel.plot(x, change["mean"], **line, zorder=3)
        label = f"{look.label}, {site}" if several else look.label
        handles.append(Line2D([], [], **line, label=label))
    ticks = {block: str(block) for block in range(1, last, max(1, round((last - 1) / 8)))}
    if any(site == "output" for (_, site), _ in groups):
        ticks[last] = "output"
    for kind, panel in zip(edits, panels.axes, strict=True):
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.set_title(_KINDS[kind][0], size=8.5, weight="normal")
    panels.named("edit switched off, by block", "change")
    return panels.finish(handles, gap=0.6)
