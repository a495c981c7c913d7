"""Average accuracy against extra parameters, a panel a merge; merge and experts are lines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..formatting import count, percent, readable
from ..runs import Evaluation
from ..style import SURFACE, Canvas, Palette, Panels, label_points, parameter_axis
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
    panels = canvas.panels(
        len(bases), high=3.2 if not alone else 4.3 if canvas.wide else 3.9, sharey=True
    )
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
        if any(sizes):
            parameter_axis(panel, list(filter(None, sizes)))
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
        points = [
            (float(repairs[name].extra_parameters or 0), 100 * repairs[name].mean["average"])
            for name in family
        ]
        panel.plot(
            *zip(*points, strict=True),
            color=palette[family[-1]].colour,
            lw=1.6,
            zorder=2,
            alpha=0.55,
        )
        for name, (x, y) in zip(family, points, strict=True):
            look, row = palette[name], repairs[name]
            mean, std = row.mean["average"], row.std["average"]
            panel.errorbar(
                x,
                y,
                yerr=100 * std,
                fmt=look.marker,
                color=look.colour,
                ms=7.5,
                mec=SURFACE,
                elinewidth=1.4,
                capsize=3,
                zorder=4,
            )
            labels.append((x, y, look.label, f"{percent(mean, std)}, {count(x)}"))
    if labelled and labels:
        label_points(panel, labels)
