"""A study's accuracies: its settings side by side, or curves along an axis of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from ...config import Json
from ..formatting import percent, readable
from ..study import Study
from ..style import ACCENT, DASHES, Canvas, Look, Palette, centred, number_axis, parameter_axis
from . import Picture

PLACE = 1
TEXT = "Mean over seeds; whiskers are the standard deviation, lines the merge and the experts."


def pictures(of: Study) -> Iterator[Picture]:
    """The averages, and each task where the study asks for them; none without finished settings."""
    if of.about.get("x"):
        found = [partial(_curves, of, ["average"]), partial(_curves, of, of.evaluation.tasks)]
    else:
        found = [partial(_averages, of), partial(_gains, of)]
    name = re.sub(r"[^\w-]", "_", str(of.about.get("name", "study")))
    shown = found[: 2 if of.about.get("by_task") else 1] if of.settings() else []
    for number, draw in enumerate(shown):
        yield Picture(f"{name}-{number}", of.title, TEXT, draw)


def _averages(of: Study, canvas: Canvas) -> Figure:
    """A panel a merge."""
    rows, bases = of.evaluation.repairs, list(dict.fromkeys(r.base for r in of.evaluation.repairs))
    names = list(dict.fromkeys(row.method for row in rows))
    columns = (len(bases), len(bases))
    panels = canvas.panels(len(bases), 0.3 * len(names) + 0.95, 0, columns, sharey=True)
    look: Json = {"fmt": "o", "color": ACCENT, "ms": 6.5, "mec": canvas.SURFACE, "elinewidth": 1.3}
    words: Json = {"fontsize": 7.5, "color": canvas.MUTED, "textcoords": "offset points"}
    words["bbox"] = canvas.PLATE
    for base, panel in zip(bases, panels.axes, strict=True):
        panels.rows(panel, range(len(names)), names)
        for row in rows:
            if row.base == base:
                y, mean, std = names.index(row.method), row.mean["average"], row.std["average"]
                panel.errorbar(100 * mean, y, xerr=100 * std, zorder=3, **look)
                end = mean if len(row.seeds) < 2 else mean + std
                panel.annotate(percent(mean, std), (100 * end, y), (7, 0), va="center", **words)
        for row in of.evaluation.references(base):
            value, merge = 100 * row.mean["average"], row.kind == "merge"
            panel.axvline(value, color=canvas.MUTED, lw=1.1, ls=DASHES if merge else "-", zorder=1)
            place: Json = {"xycoords": ("data", "axes fraction"), "ha": "center"}
            panel.annotate(f"{row.label} {value:.1f}", (value, 1), (0, 3), **place, **words)
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
        centred(panel, (j, i), f"{gain:+.1f}", "white" if abs(gain) > 0.6 * limit else canvas.INK)
    panel.set_yticks(range(len(repairs)), [row.method for row in repairs])
    panel.set_xticks(range(len(names)), list(map(readable, names)))
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelcolor=canvas.INK)
    panel.grid(visible=False)
    panel.spines["bottom"].set_visible(False)
    panel.set_xlabel("percentage points gained over the merge")
    return panels.finish()


def _curves(of: Study, names: list[str], canvas: Canvas) -> Figure:
    """Along an axis of numbers, a curve a series: on average, or a panel a task."""
    about, series, average = of.about, of.series(), names == ["average"]
    palette = Palette((name, name, name, 0) for name in series)
    size: Json = {"ms": 6.5, "lw": 1.6, "elinewidth": 1.2}
    panels = canvas.panels(1, 3.7)
    if not average:
        size = {"ms": 4, "lw": 1.3, "elinewidth": 1, "capsize": 2}
        panels = canvas.panels(len(names), 1.75, 0.6, (2, 4), sharex=True)
    base = of.evaluation.bases[0] if len(of.evaluation.bases) == 1 else ""
    at = sorted({x for points in series.values() for x in points})
    for name, panel in zip(names, panels.axes, strict=True):
        for label, points in series.items():
            look = palette[label].point | {"ls": "-", "mew": 0.8} | size
            means = [100 * row.mean[name] for row in points.values()]
            stds = [100 * row.std[name] for row in points.values()]
            panel.errorbar(list(points), means, stds, zorder=3, **look)
        for row in of.evaluation.references(base):
            panels.reference(panel, row, name, text=average)
        if about["x"] == "extra_parameters":
            parameter_axis(panel, at)
        else:
            every = math.ceil(len(at) / (8 if average else 3))
            number_axis(panel, at[::every], bool(about.get("log")))
        panels.percent(panel.yaxis, integer=True)
        panel.set_title("" if average else readable(name), size=8.5)
        panel.margins(y=0.1)
    xlabel = about.get("xlabel") or str(about["x"]).replace("_", " ")
    panels.named(xlabel, "average accuracy over tasks" if average else "accuracy")
    looks = [palette[name] for name in series if len(series) > 1]
    handles = [look.handle(marker=look.marker, lw=1.6, ms=5.5) for look in looks]
    if not average:
        handles.append(Look("the merge", canvas.MUTED, "").handle(lw=1.1, ls=DASHES))
        handles.append(Look("the expert", canvas.INK, "").handle(lw=1.1))
    return panels.finish(handles, gap=0.5)
