"""The distillation loss at each step, smoothed.

One trained model is drawn task by task; several by their mean over tasks, a line a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from ..runs import Evaluation
from ..style import ACCENT, MUTED, Canvas, Panels, label_ends
from ..words import readable
from . import Picture

PLACE = 30


def pictures(of: Evaluation) -> Iterator[Picture]:
    """None where no run kept its losses."""
    models = of.models
    trained = models[models["losses"].map(bool)] if len(models) else models
    if len(trained):
        several = trained["method"].nunique() > 1
        yield Picture(
            "training",
            "Training",
            "The distillation loss at each step, a running mean over a fortieth of the steps"
            + ("; methods with different losses cannot be compared by it." if several else "."),
            partial(_by_task if len(trained) == 1 else _by_method, trained),
        )


def _by_method(trained: pd.DataFrame, canvas: Canvas) -> Figure:
    bases = list(trained["base"].unique())
    panels = canvas.panels(len(bases), 3.1, columns=(1, 2), sharey=True)
    ends = []
    for (base, models), panel in zip(trained.groupby("base", sort=False), panels.axes, strict=True):
        panel.set_title(readable(base) if len(bases) > 1 else "")
        last = []
        for method, losses in models.groupby("method", sort=False)["losses"]:
            look, curves = (
                canvas.palette[method],
                losses.map(lambda by_task: _smooth(by_task).mean(axis=1)),
            )
            for curve in curves:
                panel.plot(curve, color=look.colour, lw=1.4)
            last.append((curves.map(lambda curve: curve.iloc[-1]).mean(), look.label, look.colour))
        ends.append(last)
    panels.named("step (each task)", "loss, mean over tasks")
    return _ended(panels, ends)


def _by_task(trained: pd.DataFrame, canvas: Canvas) -> Figure:
    curves = _smooth(trained["losses"].iloc[0])
    panels = canvas.panels(1, max(3.2, 0.16 * len(curves.columns) + 1.2))
    (panel,) = panels.axes
    panel.plot(curves, color=MUTED, lw=1, alpha=0.6)
    panel.plot(curves.mean(axis=1), color=ACCENT, lw=2.4, zorder=3)
    ends = [(curve.iloc[-1], readable(task), MUTED) for task, curve in curves.items()]
    panels.named("step (each task)", "loss")
    return _ended(panels, [[*ends, (curves.mean(axis=1).iloc[-1], "mean", ACCENT)]])


def _ended(panels: Panels, ends: list[list[tuple[float, str, str]]]) -> Figure:
    """With labels at the lines' right ends, for which the panels make room."""
    for panel, labels in zip(panels.axes, ends, strict=True):
        panel.margins(x=0.01)
        # an unseen label makes the layout leave room for those that come
        unseen = "m" * int(0.62 * max(len(text) for _, text, _ in labels) + 2)
        panel.annotate(unseen, (1, 0.5), xycoords="axes fraction", xytext=(9, 0), alpha=0,
                       textcoords="offset points", fontsize=7.5)  # fmt: skip
    figure = panels.finish()
    for panel, labels in zip(panels.axes, ends, strict=True):
        label_ends(panel, labels)
    return figure


def _smooth(losses: dict[str, list[float]]) -> pd.DataFrame:
    """A column a task, a running mean over a fortieth of the steps."""
    steps = pd.DataFrame(losses)
    return steps.rolling(2 * (len(steps) // 80) + 1, center=True, min_periods=1).mean()
