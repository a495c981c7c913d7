"""A study's accuracy along an axis of numbers, a curve a series: on average, and task by task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..study import TEXT, Study
from ..style import DASHES, INK, MUTED, SURFACE, Canvas, Palette, number_axis, parameter_axis
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
    size: dict[str, Any] = {"ms": 6.5, "lw": 1.6, "elinewidth": 1.2, "capsize": 3}
    panels = canvas.panels(1, 3.7)
    if not average:
        size = {"ms": 4, "lw": 1.3, "elinewidth": 1, "capsize": 2}
        panels = canvas.panels(len(names), 1.75, 0.6, (2, 4), sharex=True)
    base = of.evaluation.bases[0] if len(of.evaluation.bases) == 1 else ""
    at = sorted({x for points in series.values() for x in points})
    for name, panel in zip(names, panels.axes, strict=True):
        for label, points in series.items():
            look, rows = palette[label], points.values()
            panel.errorbar(
                list(points),
                [100 * row.mean[name] for row in rows],
                fmt="-",
                zorder=3,
                yerr=[100 * row.std[name] for row in rows],
                marker=look.marker,
                color=look.colour,
                mec=SURFACE,
                mew=0.8,
                **size,
            )
        for row in of.evaluation.references(base):
            panels.reference(panel, row, name, text=average)
        if about["x"] == "extra_parameters":
            parameter_axis(panel, at)
        else:
            every = math.ceil(len(at) / (8 if average else 3))
            number_axis(panel, at[::every], bool(about.get("log")))
        panels.percent(panel.yaxis, integer=True)
        panels.title(panel, "" if average else canvas.readable(name), bold=True)
        panel.margins(y=0.1)
    xlabel = about.get("xlabel") or str(about["x"]).replace("_", " ")
    panels.named(xlabel, "average accuracy over tasks" if average else "accuracy")
    handles = [
        look.handle(color=look.colour, marker=look.marker, lw=1.6, ms=5.5)
        for look in map(palette.__getitem__, series)
    ]
    handles = handles if len(handles) > 1 else []
    if not average:
        handles += [
            Line2D([], [], color=MUTED, lw=1.1, ls=DASHES, label="the merge"),
            Line2D([], [], color=INK, lw=1.1, label="the expert"),
        ]
    return panels.finish(handles, gap=0.5)
