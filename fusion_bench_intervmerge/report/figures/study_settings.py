"""A study's settings side by side: the average accuracy of each, a panel a merge."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from matplotlib.figure import Figure

from ..formatting import percent, readable
from ..study import TEXT, Study
from ..style import ACCENT, DASHES, MUTED, SURFACE, Canvas
from . import Picture

PLACE = 1


def pictures(of: Study) -> Iterator[Picture]:
    """Where no axis is one of numbers."""
    if not of.about.get("x") and of.settings():
        yield Picture("settings", of.title, TEXT, partial(_draw, of))


def _draw(of: Study, canvas: Canvas) -> Figure:
    rows, bases = of.evaluation.repairs, list(dict.fromkeys(r.base for r in of.evaluation.repairs))
    names = list(dict.fromkeys(row.method for row in rows))
    columns = (len(bases), len(bases))
    panels = canvas.panels(len(bases), 0.3 * len(names) + 0.95, 0, columns, sharey=True)
    for base, panel in zip(bases, panels.axes, strict=True):
        panels.rows(panel, range(len(names)), names)
        for row in rows:
            if row.base == base:
                y, mean, std = names.index(row.method), row.mean["average"], row.std["average"]
                panel.errorbar(
                    100 * mean,
                    y,
                    xerr=100 * std,
                    fmt="o",
                    color=ACCENT,
                    ms=6.5,
                    mec=SURFACE,
                    capsize=3,
                    elinewidth=1.3,
                    zorder=3,
                )
                end = mean if len(row.seeds) < 2 else mean + std
                panel.annotate(
                    percent(mean, std),
                    (100 * end, y),
                    xytext=(7, 0),
                    va="center",
                    textcoords="offset points",
                    fontsize=7.5,
                    color=MUTED,
                )
        for row in of.evaluation.references(base):
            value, merge = 100 * row.mean["average"], row.kind == "merge"
            panel.axvline(value, color=MUTED, lw=1.1, ls=DASHES if merge else "-", zorder=1)
            panel.annotate(
                f"{row.label} {value:.1f}",
                (value, 1),
                xytext=(0, 3),
                fontsize=7.5,
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                color=MUTED,
            )
        left, right = panel.get_xlim()
        # room for the last number; there is no accuracy beyond 100
        panel.set_xlim(left, max(right + 0.06 * (right - left), 100) if right > 80 else right * 1.1)
        panels.percent(panel.xaxis)
        panel.set_title(readable(base) if len(bases) > 1 else "")
    panels.axes[0].set_xlabel("average accuracy over tasks")
    return panels.finish()
