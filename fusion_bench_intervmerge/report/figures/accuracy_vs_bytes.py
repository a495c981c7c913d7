"""Average accuracy against the bytes beyond one model: merges, repairs and rivals in one panel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..formatting import count, percent, readable
from ..runs import Evaluation, Row
from ..style import HUES, INK, MUTED, Canvas, Look, Panels, label_points, number_axis
from . import Picture

PLACE = 5
MERGE = Look("merge", MUTED, "o")
REPAIR = Look("repair of a merge", HUES[0], "s")
TOLD = Look("rival, told the task", HUES[1], "D")
FREE = Look("rival, not told the task", HUES[2], "^")


def pictures(of: Evaluation) -> Iterator[Picture]:
    """Where rivals stand beside the repairs, or one repair is stored in several ways."""
    shown = [row for row in of.rows if row.costs.get("bytes") is not None]
    sizes = {(row.base, row.extra_parameters): row.costs["bytes"] for row in shown}
    stored = any(sizes[row.base, row.extra_parameters] != row.costs["bytes"] for row in shown)
    if any(row.kind == "rival" for row in shown) or stored:
        yield Picture(
            "bytes",
            "Accuracy against bytes",
            "Average accuracy over tasks against what is stored beyond one model, over all tasks. "
            "The line joins what nothing else beats at its size or a smaller one.",
            partial(_draw, of, shown),
            "accuracy_vs_bytes",
        )


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bytes, accuracy) those that no other point with as few bytes reaches, in order."""
    front: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front


def _look(row: Row) -> Look:
    if row.kind != "rival":
        return MERGE if row.kind == "merge" else REPAIR
    return TOLD if row.costs.get("needs_task") else FREE


def _draw(of: Evaluation, shown: Sequence[Row], canvas: Canvas) -> Figure:
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
        Panels.reference(panel, row)
    handles = []
    for look in (MERGE, REPAIR, TOLD, FREE):
        if own := [(x, y) for row, x, y in points if _look(row) is look]:
            panel.plot(*zip(*own, strict=True), alpha=0.85, zorder=4, **look.point)
            handles.append(look.handle())
    front = pareto([(x, y) for _, x, y in points])
    panel.plot(*zip(*front, strict=True), color=INK, lw=1.2, drawstyle="steps-post", zorder=2)
    figure = panels.finish(handles)
    best = {(x, y): row for row, x, y in points}
    # of points that lie above each other, the highest
    above = [x for x, _ in front[1:]] + [float("inf")]
    named = [(*at, best[at]) for at, more in zip(front, above, strict=True) if more > 1.1 * at[0]]
    named += [(x, y, row) for row, x, y in points if row.kind == "rival" and (x, y) not in front]
    label_points(panel, [(x, y, _name(row), percent(row.mean["average"])) for x, y, row in named])
    return figure


def _name(row: Row) -> str:
    on = f" on {readable(row.base)}" if row.base and row.kind != "merge" else ""
    return f"{row.label}{on}"
