"""Bias and agreement of each task, from the merge to the repaired model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from ..runs import Evaluation
from ..style import ACCENT, GRID, MERGED, MUTED, Canvas
from . import Picture

PLACE = 40
_FEW = 6  # models that are all shown


def pictures(of: Evaluation) -> Iterator[Picture]:
    """One of every model that was measured; none where there are too many."""
    measured = [(run, m) for run in of.runs for m in run.models.values() if m.features]
    for number, (run, model) in enumerate(measured if len(measured) <= _FEW else []):
        found = pd.DataFrame(model.features).T
        agreement = "agreement_after" in found and found.notna().all(axis=None)
        yield Picture(
            f"features-{number}",
            "Distance to the experts" + (f" ({run.name})" if len(measured) > 1 else ""),
            "On training images: the mean absolute difference of image features to the "
            "expert's, before the repair and after it"
            + (", and how often the predicted class is the expert's." if agreement else "."),
            partial(_draw, found, ["bias", "agreement"] if agreement else ["bias"]),
        )


def _draw(found: pd.DataFrame, kinds: list[str], canvas: Canvas) -> Figure:
    panels = canvas.panels(len(kinds), 0.24 * len(found) + 0.9, columns=(1, 2))
    y = panels.rows(list(found.index))
    for kind, panel in zip(kinds, panels.axes, strict=True):
        shares = kind == "agreement"
        before, after = ((100 if shares else 1) * found[f"{kind}_{when}"].to_numpy()
                         for when in ("before", "after"))  # fmt: skip
        panel.hlines(y, before, after, color=GRID, lw=2.5, zorder=1)
        panel.plot(before, y, **MERGED.point)
        panel.plot(after, y, "o", color=ACCENT, ms=6)
        panel.set(ylim=(len(found) - 0.4, -0.9), title="")
        panel.margins(x=0.14)
        for x, text in ((before[0], "merged"), (after[0], "repaired")):
            panel.annotate(text, (x, 0), xytext=(0, 6), textcoords="offset points", fontsize=7.5,
                           ha="center", color=MUTED)  # fmt: skip
        title = (
            "predictions equal to the expert's"
            if shares
            else "distance of features to the expert's"
        )
        panel.set_title(title, fontsize=8.5, weight="normal")
        if shares:
            panels.percent(panel.xaxis)
    return panels.finish()
