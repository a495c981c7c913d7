"""A study's settings side by side: the average accuracy of each, and its gain in every task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from ...schema import Json
from ..formatting import percent, readable
from ..study import TEXT, Study
from ..style import ACCENT, DASHES, INK, MUTED, SURFACE, Canvas, centred, note
from . import Picture

PLACE = 1


def pictures(of: Study) -> Iterator[Picture]:
    """Where no axis is one of numbers; the gains where the study asks for tasks."""
    if not of.about.get("x") and of.settings():
        yield Picture("settings", of.title, TEXT, partial(_averages, of))
        if of.about.get("by_task"):
            yield Picture("gains", of.title, TEXT, partial(_gains, of))


def _averages(of: Study, canvas: Canvas) -> Figure:
    """A panel a merge."""
    rows, bases = of.evaluation.repairs, list(dict.fromkeys(r.base for r in of.evaluation.repairs))
    names = list(dict.fromkeys(row.method for row in rows))
    columns = (len(bases), len(bases))
    panels = canvas.panels(len(bases), 0.3 * len(names) + 0.95, 0, columns, sharey=True)
    look: Json = {"fmt": "o", "color": ACCENT, "ms": 6.5, "mec": SURFACE, "elinewidth": 1.3}
    words: Json = {"fontsize": 7.5, "color": MUTED}
    for base, panel in zip(bases, panels.axes, strict=True):
        panels.rows(panel, range(len(names)), names)
        for row in rows:
            if row.base == base:
                y, mean, std = names.index(row.method), row.mean["average"], row.std["average"]
                panel.errorbar(100 * mean, y, xerr=100 * std, zorder=3, **look)
                end = mean if len(row.seeds) < 2 else mean + std
                note(panel, percent(mean, std), (100 * end, y), (7, 0), va="center", **words)
        for row in of.evaluation.references(base):
            value, merge = 100 * row.mean["average"], row.kind == "merge"
            panel.axvline(value, color=MUTED, lw=1.1, ls=DASHES if merge else "-", zorder=1)
            place: Json = {"xycoords": ("data", "axes fraction"), "ha": "center"}
            note(panel, f"{row.label} {value:.1f}", (value, 1), (0, 3), **place, **words)
        left, right = panel.get_xlim()
        # room for the last number; there is no accuracy beyond 100
        panel.set_xlim(left, max(right + 0.06 * (right - left), 100) if right > 80 else right * 1.1)
        panels.percent(panel.xaxis)
        panel.set_title(readable(base) if len(bases) > 1 else "")
    panels.axes[0].set_xlabel("average accuracy over tasks")
    return panels.finish()


def _gains(of: Study, canvas: Canvas) -> Figure:
    """Over the merge, task by task."""
    names, repairs = [*of.evaluation.tasks, "average"], of.evaluation.repairs
    merges = {row.base: row.mean for row in of.evaluation.rows if row.kind == "merge"}
    gains = np.array([100 * (row.mean - merges.get(row.base, np.nan))[names] for row in repairs])
    panels = canvas.panels(1, 0.32 * len(repairs) + 0.9)
    (panel,) = panels.axes
    limit = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 1.0
    panel.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), gain in np.ndenumerate(gains):
        centred(panel, (j, i), f"{gain:+.1f}", "white" if abs(gain) > 0.6 * limit else INK)
    panel.set_yticks(range(len(repairs)), [row.method for row in repairs])
    panel.set_xticks(range(len(names)), list(map(readable, names)))
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelcolor=INK)
    panel.grid(visible=False)
    panel.spines["bottom"].set_visible(False)
    panel.set_xlabel("percentage points gained over the merge")
    return panels.finish()
