"""How repairs came about: the loss at each step, and how close to the experts they are after it."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from ..formatting import readable
from ..runs import Evaluation
from ..style import Palette, Picture, blank, curves, dots, finish, name_axes

_FEW = 6  # models whose features are all shown
_FEATURES = {  # of Result.features: title, and what it is multiplied by
    "bias": ("distance of features to the expert's", 1),
    "agreement": ("predictions equal to the expert's", 100),
}


def losses(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """Of one trained model task by task; of several the mean over tasks, one line per seed."""
    trained = of.models[of.models["losses"].map(bool)] if len(of.models) else of.models
    if trained.empty:
        return
    x, smooth = "step (each task)", trained["losses"].map(_smooth)
    if len(trained) == 1:
        figure = curves(palette, smooth.set_axis(trained["method"]).to_dict(), x, "loss")
    else:
        bases = trained.groupby("base", sort=False)["method"]
        figure, axes = blank(len(bases), 3.1 if len(bases) == 1 else 2.2)
        for (base, methods), panel in zip(bases, axes, strict=True):
            panel.set_title(readable(base) if len(bases) > 1 else "")
            for model, method in methods.items():
                panel.plot(smooth[model].mean(axis=1), color=palette[method].colour, lw=1.4)
        name_axes(figure, x, "loss, mean over tasks")
        looks = [palette[method] for method in trained["method"].unique()]
        finish(figure, [look.handle(lw=1.6) for look in looks], gap=0.5)
    several = trained["method"].nunique() > 1
    yield Picture(
        "training",
        "Training",
        "The distillation loss at each step, a running mean over a fortieth of the steps"
        + ("; methods with different losses cannot be compared by it." if several else "."),
        figure,
    )


def _smooth(by_task: dict[str, list[float]]) -> pd.DataFrame:
    """One column per task, a running mean over a fortieth of the steps."""
    steps = pd.DataFrame(by_task)
    return steps.rolling(2 * (len(steps) // 80) + 1, center=True, min_periods=1).mean()


def features(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """Of each model before and after, unless there are too many models."""
    measured = [(run, m) for run in of.runs for m in run.models.values() if m.features]
    for number, (run, model) in enumerate(measured if len(measured) <= _FEW else []):
        table = pd.DataFrame(model.features).T
        table.loc["mean"] = table.mean()
        shown = {}
        for kind, (title, scale) in _FEATURES.items():
            if f"{kind}_after" in table and table[f"{kind}_after"].notna().all():
                both = scale * table[[f"{kind}_before", f"{kind}_after"]]
                shown[title] = both.set_axis(["merged", model.method or "repaired"], axis=1)
        yield Picture(
            "features" + (f"_{number}" if number else ""),
            "Distance to the experts" + (f" ({run.name})" if len(measured) > 1 else ""),
            "On training images: the mean absolute difference of image features to the expert's, "
            "before the repair and after it"
            + (", and how often the predicted class is the expert's." if len(shown) > 1 else "."),
            dots(palette, shown, percent=[_FEATURES["agreement"][0]]),
        )
