"""How repairs came about: the loss at each step, and how close to the experts they are after it.

Of one trained model the loss is drawn task by task; of several the mean over tasks, a line a seed.
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
_FEW = 6  # models whose features are all shown
_BIAS, _AGREEMENT = "distance of features to the expert's", "predictions equal to the expert's"


def pictures(of: Evaluation) -> Iterator[Picture]:
    """The losses as far as runs kept them, and the features unless there are too many models."""
    trained = of.models[of.models["losses"].map(bool)] if len(of.models) else of.models
    if len(trained):
        several = trained["method"].nunique() > 1
        yield Picture(
            "training",
            "Training",
            "The distillation loss at each step, a running mean over a fortieth of the steps"
            + ("; methods with different losses cannot be compared by it." if several else "."),
            partial(_losses, trained),
        )
    measured = [(run, m) for run in of.runs for m in run.models.values() if m.features]
    for number, (run, model) in enumerate(measured if len(measured) <= _FEW else []):
        found = pd.DataFrame(model.features).T
        found.loc["mean"] = found.mean()
        shown = {
            title: scale
            * found[[f"{kind}_before", f"{kind}_after"]].set_axis(
                ["merged", model.method or "repaired"], axis=1
            )
            for title, kind, scale in ((_BIAS, "bias", 1), (_AGREEMENT, "agreement", 100))
            if f"{kind}_after" in found and found[f"{kind}_after"].notna().all()
        }
        yield Picture(
            f"features-{number}",
            "Distance to the experts" + (f" ({run.name})" if len(measured) > 1 else ""),
            "On training images: the mean absolute difference of image features to the expert's, "
            "before the repair and after it"
            + (", and how often the predicted class is the expert's." if len(shown) > 1 else "."),
            partial(Canvas.dots, shown=shown, percent=[_AGREEMENT]),
        )


def _losses(trained: pd.DataFrame, canvas: Canvas) -> Figure:
    """Of one model task by task; of several the mean over tasks, a line a seed, a panel a merge."""
    x, curves = "step (each task)", trained["losses"].map(_smooth)
    if len(trained) == 1:
        return canvas.curves(curves.set_axis(trained["method"]).to_dict(), x, "loss")
    bases = trained.groupby("base", sort=False)["method"]
    panels = canvas.panels(len(bases), 3.1, 0.3, columns=(1, 2), sharey=True)
    for (base, methods), panel in zip(bases, panels.axes, strict=True):
        panel.set_title(readable(base) if len(bases) > 1 else "")
        for model, method in methods.items():
            panel.plot(curves[model].mean(axis=1), color=canvas.palette[method].colour, lw=1.4)
    panels.named(x, "loss, mean over tasks")
    looks = [canvas.palette[method] for method in trained["method"].unique()]
    return panels.finish([look.handle(lw=1.6) for look in looks], gap=0.5)


def _smooth(losses: dict[str, list[float]]) -> pd.DataFrame:
    """A column a task, a running mean over a fortieth of the steps."""
    steps = pd.DataFrame(losses)
    return steps.rolling(2 * (len(steps) // 80) + 1, center=True, min_periods=1).mean()
