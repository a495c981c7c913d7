"""Each task's accuracy: merged, every repair, and the expert; a panel a merge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..runs import Evaluation
from ..style import EXPERTS, GRID, HUES, MERGED, Canvas
from ..words import readable
from . import Picture

PLACE = 20


def pictures(of: Evaluation) -> Iterator[Picture]:
    """None where nothing was evaluated, or there are more methods than colours."""
    if of.rows and len({row.family for row in of.repairs}) <= HUES:
        yield Picture(
            "tasks",
            "Task by task",
            "A bar reaches from a task's lowest accuracy to its highest; the numbers are in the "
            "table above.",
            partial(_draw, of),
            file="accuracy_by_task",
        )


def _draw(of: Evaluation, canvas: Canvas) -> Figure:
    bases, names, palette = of.bases or [""], [*of.tasks, "average"], canvas.palette
    families = palette.families({row.method for row in of.repairs})
    methods = list(itertools.chain.from_iterable(families))
    spread = 0.5 / max(len(methods) - 1, 1) if len(methods) > 2 else 0.16
    high = max(0.27, 0.09 * len(methods)) * len(names) + 0.75
    panels = canvas.panels(len(bases), high, 0.35, sharex=True)
    heights = panels.rows(names, bold_last=True)
    for base, panel in zip(bases, panels.axes, strict=True):
        rows = [row for row in of.rows if row.base in (base, "") and row.kind != "pretrained"]
        means = [100 * row.mean[names] for row in rows]
        panel.hlines(heights, list(map(min, *means, *means)), list(map(max, *means, *means)),
                     color=GRID, lw=2.5, zorder=1)  # fmt: skip
        for row, mean in zip(rows, means, strict=True):
            std, y = 100 * row.std[names].fillna(0), heights
            if row.kind == "experts":
                panel.plot(mean, y, **EXPERTS, zorder=2)
            elif row.kind == "merge":
                panel.plot(mean, y, **MERGED.point, zorder=3)
            else:
                y = y + spread * (methods.index(row.method) - (len(methods) - 1) / 2)
                look = palette[row.method]
                panel.hlines(y, mean - std, mean + std, color=look.colour, lw=1.1)
                panel.plot(mean, y, **look.point, zorder=4)
        panels.percent(panel.xaxis, 5 if panels.figure.get_figwidth() / panels.columns > 3 else 3)
        panel.set_title(readable(base) if len(bases) > 1 else "")
    kinds, handles = {row.kind for row in of.rows}, [palette[name].handle() for name in methods]
    if "merge" in kinds:
        label = readable(bases[0]) if len(bases) == 1 else "the merge"
        handles.insert(0, Line2D([], [], **MERGED.point, label=label))
    if "experts" in kinds:
        handles.append(Line2D([], [], **EXPERTS, label="experts"))
    panels.legend(handles)
    return panels.finish()
