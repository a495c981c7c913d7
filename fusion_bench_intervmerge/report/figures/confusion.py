"""Which task is taken for which, where a task pool of all tasks' images in one stream asked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...config import Json
from ..formatting import readable
from ..runs import Evaluation
from ..style import ACCENT, INK, Canvas, centred
from . import Picture

PLACE = 25
_FEW = 3  # models that are shown; of each the first seed


def pictures(of: Evaluation) -> Iterator[Picture]:
    """One of each model that has a router; none where every task was told."""
    found = []  # model; images, a row a task, a column what it was taken for
    for run in of.runs:
        first = min((model.seed or 0 for model in run.models.values()), default=0)
        for name, own in run.reports.items():
            if "routed" in own.get("average", {}) and (run.models[name].seed or 0) == first:
                counts = pd.DataFrame(own["confusion"]).T
                names = [*run.tasks, *(["none"] if "none" in counts else [])]
                counts = counts.reindex(index=run.tasks, columns=names).fillna(0).astype(int)
                found.append((name, counts))
    for number, (name, counts) in enumerate(found[:_FEW]):
        right = counts.to_numpy().diagonal().sum() / counts.to_numpy().sum()
        yield Picture(
            f"confusion-{number}",
            "Which task is taken for which" + (f" ({name})" if len(found) > 1 else ""),
            f"Images of the task at the left that the router takes for the one below: {right:.1%} "
            "are told right.",
            partial(_draw, counts),
            "confusion" + (f"_{number}" if number else ""),
        )


def _draw(counts: pd.DataFrame, canvas: Canvas) -> Figure:
    """A square a pair of tasks, the darker the more; the numbers are images."""
    panels = canvas.panels(1, high=0.34 * len(counts) + 0.9)
    (panel,) = panels.axes
    panels.rows(panel, range(len(counts)), list(map(readable, counts.index)))
    panel.grid(visible=False)
    panel.set_xlim(-0.6, len(counts.columns) - 0.4)
    turned: Json = {} if canvas.wide else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    panel.set_xticks(range(len(counts.columns)), list(map(readable, counts)), fontsize=8, **turned)
    for row, (task, of) in enumerate(counts.iterrows()):
        for column, images in enumerate(of):
            if images:
                corner, share = (column - 0.46, row - 0.46), images / of.sum()
                square = Rectangle(corner, 0.92, 0.92, color=ACCENT, lw=0, alpha=0.6 * share)
                panel.add_patch(square)
                bold = counts.columns[column] == task
                centred(panel, (column, row), str(images), INK, "bold" if bold else "normal")
    return panels.finish()
