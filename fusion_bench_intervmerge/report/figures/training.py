"""The distillation loss at each step, smoothed.

One trained model is drawn task by task; several by their mean over tasks, a line a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from ..formatting import readable
from ..runs import Evaluation
from ..style import Canvas
from . import Picture

PLACE = 30


def pictures(of: Evaluation) -> Iterator[Picture]:
    """None where no run kept its losses."""
    trained = of.models[of.models["losses"].map(bool)] if len(of.models) else of.models
    if len(trained):
        several = trained["method"].nunique() > 1
        yield Picture(
            "training",
            "Training",
            "The distillation loss at each step, a running mean over a fortieth of the steps"
            + ("; methods with different losses cannot be compared by it." if several else "."),
            partial(_by_task if len(trained) == 1 else _by_method, trained),
        )


def _by_task(trained: pd.DataFrame, canvas: Canvas) -> Figure:
    (model,) = trained.itertuples()
    return canvas.curves({model.method: _smooth(model.losses)}, "step (each task)", "loss")


def _by_method(trained: pd.DataFrame, canvas: Canvas) -> Figure:
    bases = trained.groupby("base", sort=False)
    panels = canvas.panels(len(bases), 3.1, 0.3, columns=(1, 2), sharey=True)
    for (base, models), panel in zip(bases, panels.axes, strict=True):
        panel.set_title(readable(base) if len(bases) > 1 else "")
        for model in models.itertuples():
            curve = _smooth(model.losses).mean(axis=1)
            panel.plot(curve, color=canvas.palette[model.method].colour, lw=1.4)
    panels.named("step (each task)", "loss, mean over tasks")
    looks = [canvas.palette[method] for method in trained["method"].unique()]
    return panels.finish([look.handle(lw=1.6) for look in looks], gap=0.5)


def _smooth(losses: dict[str, list[float]]) -> pd.DataFrame:
    """A column a task, a running mean over a fortieth of the steps."""
    steps = pd.DataFrame(losses)
    return steps.rolling(2 * (len(steps) // 80) + 1, center=True, min_periods=1).mean()
