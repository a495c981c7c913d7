"""Each task's accuracy: merged, every repair, and the expert; a panel a merge."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from ..formatting import readable
from ..runs import Evaluation
from ..style import HUES, Canvas
from . import Picture

PLACE = 20
_REFERENCES = {"merge": "merged", "experts": "expert"}


def pictures(of: Evaluation) -> Iterator[Picture]:
    """None where nothing was evaluated, or there are more methods than colours."""
    if of.rows and len({row.family for row in of.repairs}) <= len(HUES):
        yield Picture(
            "tasks",
            "Task by task",
            "A bar reaches from a task's lowest accuracy to its highest; the numbers are in the "
            "table above.",
            partial(_draw, of),
            "accuracy_by_task",
        )


def _draw(of: Evaluation, canvas: Canvas) -> Figure:
    families = canvas.palette.families({row.method for row in of.repairs})
    order = ["merged", *(name for family in families for name in family), "expert"]
    means, deviations = {}, {}
    for base in of.bases or [""]:
        rows = {
            _REFERENCES.get(row.kind, row.method): row
            for row in of.rows
            if row.base in (base, "") and row.kind != "pretrained"
        }
        title, shown = readable(base) if len(of.bases) > 1 else "", [n for n in order if n in rows]
        names = [*of.tasks, "average"]
        means[title] = pd.DataFrame({name: 100 * rows[name].mean[names] for name in shown})
        deviations[title] = pd.DataFrame({name: 100 * rows[name].std[names] for name in shown})
    merged = readable(of.bases[0]) if len(of.bases) == 1 else "the merge"
    return canvas.dots(means, deviations, list(means), merged)
