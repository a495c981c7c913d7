"""A study's accuracy along an axis of numbers, a curve a series: on average, and task by task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

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
    x, series, average = of.about["x"], of.series(), names == ["average"]
    palette = Palette((name, name, name, 0) for name in series)
    panels = (
        canvas.panels(1, 3.7)
        if average
        else canvas.panels(len(names), 1.75, 0.6, (2, 4), broad=False, sharex=True)
    )
    sizes = {"ms": 6.5, "lw": 1.6, "elinewidth": 1.2, "capsize": 3, "mec": SURFACE, "mew": 0.8}
    small = {"ms": 4, "lw": 1.3, "elinewidth": 1, "capsize": 2}
    base = of.evaluation.bases[0] if len(of.evaluation.bases) == 1 else ""
    for name, panel in zip(names, panels.axes, strict=True):
        for label, (mean, std) in series.items():
            look = palette[label]
            panel.errorbar(mean.index, 100 * mean[name], yerr=100 * std[name].fillna(0), fmt="-",
                           marker=look.marker, color=look.colour, zorder=3,
                           **(sizes if average else small))  # fmt: skip
        for row in of.evaluation.references(base):
            panels.reference(panel, row, name, text=average)
        at = [value for mean, _ in series.values() for value in mean.index]
        if x == "extra_parameters":
            parameter_axis(panel, at)
        else:
            number_axis(panel, at, bool(of.about.get("log")), most=8 if average else 3)
        panels.percent(panel.yaxis, integer=True)
        if not average:
            panels.title(panel, canvas.readable(name), bold=True)
    panel.margins(y=0.1)
    xlabel = of.about.get("xlabel") or str(x).replace("_", " ")
    panels.named(xlabel, "average accuracy over tasks" if average else "accuracy")
    line = {"lw": 1.6, "ms": 5.5}
    handles = [
        palette[n].handle(color=palette[n].colour, marker=palette[n].marker, **line) for n in series
    ]
    handles = handles if len(handles) > 1 else []
    if not average:
        handles += [Line2D([], [], color=MUTED, lw=1.1, ls=DASHES, label="the merge"),
                    Line2D([], [], color=INK, lw=1.1, label="the expert")]  # fmt: skip
    panels.legend(handles, gap=0.5)
    return panels.finish()
