"""What each setting of a study gains over the merge, task by task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from ..study import TEXT, Study
from ..style import INK, Canvas
from . import Picture

PLACE = 3


def pictures(of: Study) -> Iterator[Picture]:
    """Beside the settings' averages, where the study asks for tasks."""
    if of.about.get("by_task") and not of.about.get("x") and of.settings():
        yield Picture("gains", of.title, TEXT, partial(_draw, of))


def _draw(of: Study, canvas: Canvas) -> Figure:
    names, repairs = [*of.evaluation.tasks, "average"], of.evaluation.repairs
    merges = {row.base: row.mean for row in of.evaluation.rows if row.kind == "merge"}
    gains = np.array([100 * (row.mean - merges.get(row.base, np.nan))[names] for row in repairs])
    panels = canvas.panels(1, 0.32 * len(repairs) + 0.9)
    (panel,) = panels.axes
    limit = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 1.0
    panel.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), gain in np.ndenumerate(gains):
        panel.text(
            j,
            i,
            f"{gain:+.1f}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if abs(gain) > 0.6 * limit else INK,
        )
    panel.set_yticks(range(len(repairs)), [row.method for row in repairs])
    panel.set_xticks(range(len(names)), list(map(canvas.readable, names)))
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelcolor=INK)
    panel.grid(visible=False)
    panel.spines["bottom"].set_visible(False)
    panel.set_xlabel("percentage points gained over the merge")
    return panels.finish()
