"""Average accuracy against extra parameters, a panel a merge; merge and experts are lines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..formatting import count, percent, readable
from ..runs import Evaluation
from ..style import Canvas, Palette, Panels, label_points, parameter_axis
from . import Picture

PLACE = 10
MOST = 9  # panels


def pictures(of: Evaluation) -> Iterator[Picture]:
    """None where there is nothing to compare, or more merges than panels can show."""
    merges = {row.base for row in of.repairs if row.base}
    if 0 < len(merges) <= MOST and len([row for row in of.rows if row.kind != "pretrained"]) > 1:
        yield Picture(
            "parameters",
            "Accuracy against extra parameters",
            "Average accuracy over tasks. Lines are the merge without repair and the experts; "
            "whiskers are the standard deviation over seeds.",
            partial(_draw, of),
            "accuracy_vs_parameters",
        )


def _draw(of: Evaluation, canvas: Canvas) -> Figure:
    bases = [base for base in of.bases if any(row.base == base for row in of.repairs)]
    alone = len(bases) == 1
    high = 3.2 if not alone else 4.3 if canvas.wide else 3.9
    panels = canvas.panels(len(bases), high, sharey=True)
    shown = [row for row in of.rows if row.kind != "pretrained"]
    averages = [100 * value for row in shown for value in row.values["average"]]
    low, high = min(averages), max(averages)
    room = max(0.12 * (high - low), 1.0)  # for the references' names
    for base, panel in zip(bases, panels.axes, strict=True):
        panel.set(title="" if alone else readable(base), ylim=(low - room, high + room))
        panels.percent(panel.yaxis, integer=True)
        # where panels share their heights, each says what it is
        panel.tick_params(labelleft=True)
        sizes = [row.extra_parameters for row in of.repairs if row.base == base]
        if sizes := list(filter(None, sizes)):
            parameter_axis(panel, sizes)
        else:
            panel.set_xticks([])
    panels.named("extra parameters, all tasks (log scale)", "average accuracy over tasks")
    families = canvas.palette.families({row.method for row in of.repairs})
    # beside each other the panels have no room for a label at every point
    looks = [canvas.palette[name] for family in families for name in family if not alone]
    figure = panels.finish([look.handle() for look in looks])
    for base, panel in zip(bases, panels.axes, strict=True):
        _scatter(panel, base, of, canvas.palette, labelled=alone)
    return figure


def _scatter(panel: Axes, base: str, of: Evaluation, palette: Palette, labelled: bool) -> None:
    for row in of.references(base):
        Panels.reference(panel, row)
    repairs = {row.method: row for row in of.repairs if row.base == base and row.extra_parameters}
    labels = []
    for family in palette.families(repairs):
        points = []
        for look, row in ((palette[name], repairs[name]) for name in family):
            mean, std = row.mean["average"], row.std["average"]
            x, y = float(row.extra_parameters or 0), 100 * mean
            marked = look.point | {"ms": 7.5, "mew": 1}
            panel.errorbar(x, y, 100 * std, elinewidth=1.4, zorder=4, **marked)
            points.append((x, y))
            labels.append((x, y, look.label, f"{percent(mean, std)}, {count(x)}"))
        colour = palette[family[-1]].colour
        panel.plot(*zip(*points, strict=True), color=colour, lw=1.6, zorder=2, alpha=0.55)
    if labelled and labels:
        label_points(panel, labels)
