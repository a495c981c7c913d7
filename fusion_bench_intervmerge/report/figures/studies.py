"""A study's accuracies: its settings side by side, or curves along an axis of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ...config import Json
from ..formatting import percent, readable
from ..study import Study
from ..style import (
    HUES,
    Palette,
    Picture,
    blank,
    finish,
    name_axes,
    percent_axis,
    references,
    rows,
    size_axis,
    squares,
)

_TEXT = "Mean over seeds; whiskers are the standard deviation, lines the merge and the experts."


def curves(of: Study) -> Iterator[Picture]:
    """Along an axis of numbers: on average, and one panel per task if the study asks for them."""
    if of.about.get("x") and of.settings():
        yield Picture(_name(of), of.title, _TEXT, _curves(of, ["average"]))
        if of.about.get("by_task"):
            figure = _curves(of, of.evaluation.tasks)
            yield Picture(f"{_name(of)}_2", f"{of.title}, by task", _TEXT, figure)


def side_by_side(of: Study) -> Iterator[Picture]:
    """Of any other study: averages, and gains task by task if the study asks for them."""
    if not of.about.get("x") and of.settings():
        yield Picture(_name(of), of.title, _TEXT, _averages(of))
        if of.about.get("by_task"):
            text = "Percentage points gained over the merge, mean over seeds."
            yield Picture(f"{_name(of)}_2", f"{of.title}, by task", text, _gains(of))


def _name(of: Study) -> str:
    return re.sub(r"[^\w-]", "_", str(of.about["name"]))


def _averages(of: Study) -> Figure:
    """One panel per merge."""
    repairs = of.evaluation.repairs
    bases = list(dict.fromkeys(row.base for row in repairs))
    names = list(dict.fromkeys(row.method for row in repairs))
    figure, axes = blank(len(bases), 0.3 * len(names) + 0.5, columns=len(bases))
    panels = dict(zip(bases, axes, strict=True))
    lines = [(panel, of.evaluation.references(base), "average") for base, panel in panels.items()]
    handles = references(lines, upright=True)
    for base, panel in panels.items():
        rows(panel, range(len(names)), names)
        percent_axis(panel.xaxis)
        panel.set_title(readable(base) if len(bases) > 1 else "")
        for row in (row for row in repairs if row.base == base):
            y, mean, std = names.index(row.method), row.mean["average"], row.std["average"]
            panel.errorbar(100 * mean, y, xerr=100 * std, fmt="o", color=HUES[0], ms=6, zorder=3)
            number: Json = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
            panel.annotate(percent(mean, std), (100 * mean, y), (0, 5), **number)
    figure.supxlabel("average accuracy over tasks", fontsize=8.5)
    return finish(figure, handles, gap=0.6)


def _gains(of: Study) -> Figure:
    """Over the merge, task by task."""
    names, repairs = [*of.evaluation.tasks, "average"], of.evaluation.repairs
    merges = {row.base: row.mean for row in of.evaluation.rows if row.kind == "merge"}
    gains = [
        100 * (row.mean - merges.get(row.base, np.nan))[names].astype(float) for row in repairs
    ]
    table = pd.DataFrame(gains, index=[row.method for row in repairs])
    figure, (panel,) = blank(high=0.32 * len(repairs) + 0.7)
    limit = float(np.nanmax(np.abs(table.to_numpy()), initial=1e-9))
    squares(panel, table, table.to_numpy() / limit, "{:+.1f}".format)
    return finish(figure)


def _curves(of: Study, names: Sequence[str]) -> Figure:
    """One curve per series; of the average, or of each task."""
    about, series, average = of.about, of.series(), len(names) == 1
    palette = Palette((name, name, 1) for name in series)
    figure, axes = blank(len(names), 3.7 if average else 1.75, columns=4, sharex=True)
    lines = of.evaluation.references(
        of.evaluation.bases[0] if len(of.evaluation.bases) == 1 else ""
    )
    handles = references([(panel, lines, name) for name, panel in zip(names, axes, strict=True)])
    at = sorted({x for points in series.values() for x in points})
    for name, panel in zip(names, axes, strict=True):
        for label, points in series.items():
            point = palette[label].point | {"ls": "-", "ms": 6 if average else 4, "lw": 1.5}
            means = [100 * row.mean[name] for row in points.values()]
            stds = [100 * row.std[name] for row in points.values()]
            panel.errorbar(list(points), means, stds, zorder=3, elinewidth=1.1, **point)
        panel.set_title("" if average else readable(name))
    if about["x"] == "extra_parameters":
        size_axis(axes[0], at)
    else:
        ticks = at[:: math.ceil(len(at) / (8 if average else 3))]
        axes[0].set_xscale("log" if about.get("log") else "linear")
        axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0].xaxis.set_minor_locator(NullLocator())
    percent_axis(axes[0].yaxis, integer=True)
    xlabel = about.get("xlabel") or str(about["x"]).replace("_", " ")
    name_axes(figure, xlabel, "average accuracy over tasks" if average else "accuracy")
    for look in (palette[name] for name in series if len(series) > 1):
        handles.append(look.handle(marker=look.point["marker"], lw=1.6, ms=5.5))
    return finish(figure, handles, gap=0.6)
