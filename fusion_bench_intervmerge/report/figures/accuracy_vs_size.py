"""Average accuracy against what is stored beyond one model: bytes, and extra parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..formatting import count, percent, readable
from ..runs import Evaluation, Row
from ..style import HUES, Canvas, Look, label_points, number_axis, parameter_axis
from . import Picture

PLACE = 10
MOST = 9  # panels
MERGE = Look("merge", Canvas.MUTED, "o")
REPAIR = Look("repair of a merge", HUES[0], "s")
TOLD = Look("rival, told the task", HUES[1], "D")
FREE = Look("rival, not told the task", HUES[2], "^")


def pictures(of: Evaluation) -> Iterator[Picture]:
    """Bytes where rivals stand beside the repairs, or one repair is stored in several ways.

    Parameters unless there is nothing to compare, or there are more merges than panels can show.
    """
    shown = [row for row in of.rows if row.costs.get("bytes") is not None]
    sizes = {(row.base, row.extra_parameters): row.costs["bytes"] for row in shown}
    stored = any(sizes[row.base, row.extra_parameters] != row.costs["bytes"] for row in shown)
    if any(row.kind == "rival" for row in shown) or stored:
        yield Picture(
            "bytes",
            "Accuracy against bytes",
            "Average accuracy over tasks against what is stored beyond one model, over all tasks. "
            "The line joins what nothing else beats at its size or a smaller one.",
            partial(_by_bytes, of, shown),
            "accuracy_vs_bytes",
        )
    merges = {row.base for row in of.repairs if row.base}
    if 0 < len(merges) <= MOST and len([row for row in of.rows if row.kind != "pretrained"]) > 1:
        yield Picture(
            "parameters",
            "Accuracy against extra parameters",
            "Average accuracy over tasks. Lines are the merge without repair and the experts; "
            "whiskers are the standard deviation over seeds.",
            partial(_by_parameters, of),
            "accuracy_vs_parameters",
        )


def _look(row: Row) -> Look:
    if row.kind != "rival":
        return MERGE if row.kind == "merge" else REPAIR
    return TOLD if row.costs.get("needs_task") else FREE


def _by_bytes(of: Evaluation, shown: Sequence[Row], canvas: Canvas) -> Figure:
    panels = canvas.panels(high=4.8)
    (panel,) = panels.axes
    stored = [row.costs["bytes"] for row in shown if row.costs["bytes"]]
    zero = min(stored) / 4  # where what stores nothing stands
    points = [(row, max(row.costs["bytes"], zero), 100 * row.mean["average"]) for row in shown]
    tens = [10.0**e for e in range(2, 13) if zero * 2 < 10.0**e < max(stored) * 2]
    words = FuncFormatter(lambda x, _: "0" if x == zero else count(x).replace(".0", ""))
    number_axis(panel, [zero, *tens], True, words)
    panel.set_xlim(zero / 1.6, max(stored) * 3)
    panels.percent(panel.yaxis, integer=True)
    panels.named("bytes beyond one model (log scale)", "average accuracy over tasks")
    for row in of.references(""):
        panels.reference(panel, row)
    handles = []
    for look in (MERGE, REPAIR, TOLD, FREE):
        if own := [(x, y) for row, x, y in points if _look(row) is look]:
            panel.plot(*zip(*own, strict=True), alpha=0.85, zorder=4, **look.point)
            handles.append(look.handle())
    front: list[tuple[float, float]] = []  # what no other point with as few bytes reaches
    for x, y in sorted(((x, y) for _, x, y in points), key=lambda at: (at[0], -at[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    panel.plot(*zip(*front, strict=True), color=canvas.INK, lw=1.2, ds="steps-post", zorder=2)
    figure = panels.finish(handles)
    best = {(x, y): row for row, x, y in points}
    # of points that lie above each other, the highest
    above = [x for x, _ in front[1:]] + [float("inf")]
    named = [(*at, best[at]) for at, more in zip(front, above, strict=True) if more > 1.1 * at[0]]
    named += [(x, y, row) for row, x, y in points if row.kind == "rival" and (x, y) not in front]
    labels = []
    for x, y, row in named:
        on = f" on {readable(row.base)}" if row.base and row.kind != "merge" else ""
        labels.append((x, y, row.label + on, percent(row.mean["average"])))
    label_points(panel, labels)
    return figure


def _by_parameters(of: Evaluation, canvas: Canvas) -> Figure:
    palette, repairs = canvas.palette, of.repairs
    bases = [base for base in of.bases if any(row.base == base for row in repairs)]
    alone = len(bases) == 1
    high = 3.2 if not alone else 4.3 if canvas.wide else 3.9
    panels = canvas.panels(len(bases), high, sharey=True)
    shown = [row for row in of.rows if row.kind != "pretrained"]
    averages = [100 * value for row in shown for value in row.values["average"]]
    low, high = min(averages), max(averages)
    room = max(0.12 * (high - low), 1.0)  # for the references' names
    labels = []
    for base, panel in zip(bases, panels.axes, strict=True):
        panel.set(title="" if alone else readable(base), ylim=(low - room, high + room))
        panels.percent(panel.yaxis, integer=True)
        # where panels share their heights, each says what it is
        panel.tick_params(labelleft=True)
        for row in of.references(base):
            panels.reference(panel, row)
        rows = {row.method: row for row in repairs if row.base == base and row.extra_parameters}
        sizes = {name: float(row.costs["extra_parameters"]) for name, row in rows.items()}
        if sizes:
            parameter_axis(panel, sizes.values())
        else:
            panel.set_xticks([])
        for family in palette.families(rows):
            for name in family:
                mean, std = rows[name].mean["average"], rows[name].std["average"]
                point = palette[name].point | {"ms": 7.5, "mew": 1, "elinewidth": 1.4}
                panel.errorbar(sizes[name], 100 * mean, 100 * std, zorder=4, **point)
                words = palette[name].label, f"{percent(mean, std)}, {count(sizes[name])}"
                labels.append((sizes[name], 100 * mean, *words))
            x, y = [sizes[n] for n in family], [100 * rows[n].mean["average"] for n in family]
            panel.plot(x, y, color=palette[family[-1]].colour, lw=1.6, zorder=2, alpha=0.55)
    panels.named("extra parameters, all tasks (log scale)", "average accuracy over tasks")
    # beside each other the panels have no room for a label at every point
    names = [name for family in palette.families(row.method for row in repairs) for name in family]
    figure = panels.finish([palette[name].handle() for name in names if not alone])
    if alone and labels:
        label_points(panels.axes[0], labels)
    return figure
