"""A study's accuracy along an axis of numbers, a curve a series: on average, and task by task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...schema import Json
from ..study import TEXT, Study
from ..style import DASHES, INK, MUTED, Canvas, Palette, number_axis, parameter_axis
from . import Picture

PLACE = 2


def pictures(of: Study) -> Iterator[Picture]:
    """Where ``x`` names the axis."""
    if of.about.get("x") and of.settings():
        yield Picture("curves", of.title, TEXT, partial(_draw, of, ["average"]))
        if of.about.get("by_task"):
            make = partial(_draw, of, of.evaluation.tasks)
            yield Picture("curves_by_task", of.title, TEXT, make)


def _draw(of: Study, names: list[str], canvas: Canvas) -> Figure:
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
        panel.set_title("" if average else canvas.readable(name), size=8.5)
        panel.margins(y=0.1)
    xlabel = about.get("xlabel") or str(about["x"]).replace("_", " ")
    panels.named(xlabel, "average accuracy over tasks" if average else "accuracy")
    looks = [palette[name] for name in series if len(series) > 1]
    handles = [look.handle(marker=look.marker, lw=1.6, ms=5.5) for look in looks]
    if not average:
        handles += [
            Line2D([], [], color=MUTED, lw=1.1, ls=DASHES, label="the merge"),
            Line2D([], [], color=INK, lw=1.1, label="the expert"),
        ]
    return panels.finish(handles, gap=0.5)
