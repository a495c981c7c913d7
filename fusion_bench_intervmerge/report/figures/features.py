"""Bias and agreement of each task, from the merge to the repaired model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

from ..runs import Evaluation
from ..style import Canvas
from . import Picture

PLACE = 40
_FEW = 6  # models that are all shown
_BIAS, _AGREEMENT = "distance of features to the expert's", "predictions equal to the expert's"


def pictures(of: Evaluation) -> Iterator[Picture]:
    """One of every model that was measured; none where there are too many."""
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
