"""Average accuracy against what is stored beyond one model, and each task's accuracy."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from ..formatting import percent, readable
from ..runs import Evaluation
from ..style import (
    INK,
    Palette,
    Picture,
    blank,
    dots,
    finish,
    name_axes,
    percent_axis,
    references,
    size_axis,
)

_MOST = 9  # panels, and methods of a task


def by_bytes(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """If rivals stand beside the repairs."""
    shown = [row for row in of.rows if "bytes" in row.costs and row.kind != "experts"]
    if not any(row.kind == "rival" for row in shown):
        return
    facts = [
        (row.method or "merged", row.costs["bytes"], 100 * row.mean["average"]) for row in shown
    ]
    points = pd.DataFrame(facts, columns=["method", "bytes", "average"])
    figure, (panel,) = blank(high=4.4)
    handles = references([(panel, of.references(""), "average")])
    best = points.groupby("method")["average"].max().sort_values(ascending=False)
    for method, average in best.items():
        own, look = points[points["method"] == method], palette[str(method)]
        panel.plot(own["bytes"], own["average"], **look.point, zorder=3)
        handles.append(look.handle(f"{look.label} {average:.1f}"))
    points = points.sort_values(["bytes", "average"], ascending=[True, False])
    front = points[points["average"] > points["average"].cummax().shift(fill_value=-1)]
    panel.plot(front["bytes"], front["average"], color=INK, lw=1, ds="steps-post", alpha=0.5)
    size_axis(panel, points["bytes"])
    percent_axis(panel.yaxis, integer=True)
    name_axes(figure, "bytes beyond one model (log scale)", "average accuracy over tasks")
    yield Picture(
        "accuracy_vs_bytes",
        "Accuracy against bytes",
        "Average accuracy over tasks against what is stored beyond one model, over all tasks. One "
        "point per merge that a method repairs, its best in the legend; the line joins what "
        "nothing else beats at its size or a smaller one.",
        finish(figure, handles, gap=0.6),
    )


def by_parameters(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """Unless there is nothing to compare, or there are more merges than panels can show."""
    repairs = [row for row in of.repairs if row.base and "extra_parameters" in row.costs]
    bases = list(dict.fromkeys(row.base for row in repairs))
    if not 0 < len(bases) <= _MOST or len(of.rows) < 2:
        return
    alone = len(bases) == 1
    figure, axes = blank(len(bases), 3.8 if alone else 2.4, sharex=True)
    panels = dict(zip(bases, axes, strict=True))
    handles = references(
        [(panel, of.references(base), "average") for base, panel in panels.items()]
    )
    values = {}
    for base, panel in panels.items():
        panel.set_title("" if alone else readable(base))
        rows = {row.method: row for row in repairs if row.base == base}
        size = {name: row.costs["extra_parameters"] for name, row in rows.items()}
        for family in palette.families(rows):
            for name in family:
                mean, std = rows[name].mean["average"], rows[name].std["average"]
                values[name] = percent(mean, std)
                point = palette[name].point | {"ms": 7.5, "elinewidth": 1.4}
                panel.errorbar(size[name], 100 * mean, 100 * std, zorder=3, **point)
            x, y = [size[n] for n in family], [100 * rows[n].mean["average"] for n in family]
            panel.plot(x, y, color=palette[family[-1]].colour, lw=1.6, zorder=2, alpha=0.55)
    size_axis(axes[0], (row.costs["extra_parameters"] for row in repairs))
    percent_axis(axes[0].yaxis, integer=True)
    name_axes(figure, "extra parameters, all tasks (log scale)", "average accuracy over tasks")
    for name in (name for family in palette.families(values) for name in family):
        handles.append(
            palette[name].handle(f"{palette[name].label} {values[name]}" if alone else "")
        )
    yield Picture(
        "accuracy_vs_parameters",
        "Accuracy against extra parameters",
        "Average accuracy over tasks. Lines are the merge without repair and the experts; "
        "whiskers are the standard deviation over seeds.",
        finish(figure, handles, gap=0.6),
    )


def by_task(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """Unless there are too many methods."""
    if not of.rows or len({row.method for row in of.repairs}) > _MOST:
        return
    families = palette.families({row.method for row in of.repairs})
    order = ["merged", *(name for family in families for name in family), "expert"]
    encoders, tasks = {"merge": "merged", "experts": "expert"}, [*of.tasks, "average"]
    means, deviations = {}, {}
    # a merge below a calibrated one is in the table; alone it shows nothing here
    bases = list(dict.fromkeys(row.base for row in of.repairs)) or of.bases or [""]
    for base in bases:
        rows = {
            encoders.get(row.kind, row.method): row
            for row in of.rows
            if row.base in (base, "") and row.kind != "pretrained"
        }
        title, shown = readable(base) if len(bases) > 1 else "", [n for n in order if n in rows]
        means[title] = pd.DataFrame({name: 100 * rows[name].mean[tasks] for name in shown})
        deviations[title] = pd.DataFrame({name: 100 * rows[name].std[tasks] for name in shown})
    yield Picture(
        "accuracy_by_task",
        "Task by task",
        "A bar reaches from a task's lowest accuracy to its highest; the numbers are in the "
        "table above.",
        dots(palette, means, deviations, list(means)),
    )
