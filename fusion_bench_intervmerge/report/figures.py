"""The figures of a report, each for any width in inches: a page shows a wide and a narrow one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from .drawing import (
    GRID,
    HUES,
    INK,
    MUTED,
    PERCENT,
    PLATE,
    SURFACE,
    WIDE,
    Colours,
    axis_names,
    canvas,
    freeze,
    grid,
    keep_panels,
    label_ends,
    label_points,
    parameter_axis,
    place_legend,
    style,
)
from .runs import Result, Study
from .tables import Row
from .words import count, percent, readable


def accuracy_vs_parameters(
    study: Study, table: Sequence[Row], width: float = WIDE
) -> Figure | None:
    """Average accuracy against extra parameters, a panel a base; merge and experts are lines.

    None where there is nothing to compare.

    Args:
        study: the results.
        table: its rows.
        width: of the figure, in inches.
    """
    bases = [b for b in study.bases if any(r.base == b and r.kind == "repair" for r in table)]
    if not bases or len([r for r in table if r.kind != "pretrained"]) < 2:
        return None
    columns, lines, width = grid(len(bases), width)
    high = (4.3 if width >= WIDE else 3.9) if len(bases) == 1 else 3.2
    with style():
        figure, axes = canvas(width, high * lines, lines, columns, sharey=True)
        panels = keep_panels(axes, len(bases))
        colours = _colours(table)
        for base, panel in zip(bases, panels, strict=True):
            panel.set_title(readable(base) if len(bases) > 1 else "")
            panel.set_ylim(*_limits([r for r in table if r.kind != "pretrained"]))
            panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.yaxis.set_major_formatter(PERCENT)
            # where panels share their heights, each says what it is
            panel.tick_params(labelleft=True)
            repairs = [r for r in table if r.base == base and r.extra_parameters]
            if repairs:
                parameter_axis(panel, [float(r.extra_parameters or 1) for r in repairs])
            else:
                panel.set_xticks([])
        axis_names(
            figure, panels, "extra parameters, all tasks (log scale)", "average accuracy over tasks"
        )
        several = len(bases) > 1
        if several:
            # beside each other the panels have no room for a label at every point
            methods = list(itertools.chain.from_iterable(colours.families()))
            place_legend(figure, _handles(colours, methods), width)
        freeze(figure)
        for base, panel in zip(bases, panels, strict=True):
            _scatter(panel, base, table, colours, labelled=not several)
    return figure


def accuracy_by_task(study: Study, table: Sequence[Row], width: float = WIDE) -> Figure | None:
    """Each task's accuracy: merged, every repair, and the expert; a panel a base.

    None where nothing was evaluated, or there are more methods than colours to tell them apart.

    Args:
        study: the results.
        table: its rows.
        width: of the figure, in inches.
    """
    if not table or len(_colours(table).families()) > HUES:
        return None
    bases = study.bases or [""]
    names = [*study.tasks, "average"]
    columns, lines, width = grid(len(bases), width)
    with style():
        colours = _colours(table)
        methods = list(itertools.chain.from_iterable(colours.families()))
        per_row = max(0.27, 0.09 * len(methods))
        figure, axes = canvas(
            width, (per_row * len(names) + 0.75) * lines + 0.35, lines, columns, sharex=True
        )
        panels = keep_panels(axes, len(bases))
        heights = {name: i + (0.35 if name == "average" else 0) for i, name in enumerate(names)}
        for i, (base, panel) in enumerate(zip(bases, panels, strict=True)):
            _dots(panel, [r for r in table if r.base in (base, None)], heights, colours, methods)
            panel.set_yticks(list(heights.values()), [readable(n) for n in heights])
            panel.get_yticklabels()[-1].set_fontweight("bold")
            panel.tick_params(axis="y", labelcolor=INK, labelleft=i % columns == 0)
            panel.tick_params(axis="x", labelbottom=True)
            panel.set_ylim(len(names) - 0.1, -0.6)
            panel.grid(axis="y", visible=False)
            panel.grid(axis="x", visible=True)
            panel.xaxis.set_major_locator(MaxNLocator(5 if width / columns > 3 else 3))
            panel.xaxis.set_major_formatter(PERCENT)
            panel.spines["bottom"].set_visible(False)
            panel.tick_params(axis="x", length=0)
            if len(bases) > 1:
                panel.set_title(readable(base))
        merged = readable(bases[0]) if len(bases) == 1 else "the merge"
        _legend(figure, table, colours, methods, merged, width)
    return figure


def training_curves(study: Study, table: Sequence[Row], width: float = WIDE) -> Figure | None:
    """The distillation loss at each step, smoothed; None where no run kept it.

    One trained model is drawn task by task; several by their mean over tasks, a line a seed.
    """
    trained = [r for r in study.results if r.losses]
    if not trained:
        return None
    if len(trained) == 1:
        return _curves_by_task(trained[0], width)
    bases = [b for b in study.bases if any(r.base == b for r in trained)]
    columns, lines, width = grid(len(bases), width, widest=2)
    with style():
        figure, axes = canvas(width, 3.1 * lines, lines, columns, sharey=True)
        colours, ends = _colours(table), []
        for base, panel in zip(bases, keep_panels(axes, len(bases)), strict=True):
            by_method: dict[str, list[np.ndarray]] = {}
            for result in trained:
                if result.base == base:
                    curve = _smooth(np.mean(list(result.losses.values()), axis=0))
                    by_method.setdefault(result.method or "", []).append(curve)
                    panel.plot(curve, color=colours.colour(result.method or ""), lw=1.4)
            ends.append((panel, [
                (float(np.mean([c[-1] for c in curves])), readable(m), colours.colour(m))
                for m, curves in by_method.items()
            ]))  # fmt: skip
            panel.set_title(readable(base) if len(bases) > 1 else "")
        _finish_curves(figure, ends, "step (each task)", "loss, mean over tasks")
    return figure


def features(found: Mapping[str, Mapping[str, float]], width: float = WIDE) -> Figure | None:
    """Bias and agreement of each task, from the merge to the repaired model; None without any."""
    if not found:
        return None
    kinds = [("bias", "distance of features to the expert's")]
    if all("agreement_after" in row for row in found.values()):
        kinds.append(("agreement", "predictions equal to the expert's"))
    columns, lines, width = grid(len(kinds), width, widest=2)
    with style():
        figure, axes = canvas(width, (0.24 * len(found) + 0.9) * lines, lines, columns)
        for i, ((kind, title), panel) in enumerate(
            zip(kinds, keep_panels(axes, len(kinds)), strict=True)
        ):
            scale = 100 if kind == "agreement" else 1
            before, after = (
                scale * np.array([row[f"{kind}_{when}"] for row in found.values()])
                for when in ("before", "after")
            )
            y = np.arange(len(found))
            panel.hlines(y, before, after, color=GRID, lw=2.5, zorder=1)
            panel.plot(before, y, "o", mfc=SURFACE, mec=MUTED, ms=5.5, mew=1.3)
            panel.plot(after, y, "o", color="#0072b2", ms=6)
            panel.set_yticks(y, list(map(readable, found)) if i % columns == 0 else [""] * len(y))
            panel.tick_params(axis="y", labelcolor=INK)
            panel.set_ylim(len(found) - 0.4, -0.9)
            for x, text in ((before[0], "merged"), (after[0], "repaired")):
                panel.annotate(
                    text, (x, 0), xytext=(0, 6), textcoords="offset points", fontsize=7.5,
                    ha="center", color=MUTED,
                )  # fmt: skip
            panel.set_title(title, fontsize=8.5, weight="normal")
            panel.grid(axis="y", visible=False)
            panel.grid(axis="x", visible=True)
            panel.margins(x=0.14)
            panel.spines["bottom"].set_visible(False)
            if scale == 100:
                panel.xaxis.set_major_formatter(PERCENT)
    return figure


# -- parts -----------------------------------------------------------------------------------------


def _limits(shown: Sequence[Row]) -> tuple[float, float]:
    """Of an axis of average accuracies in percent, with room for the references' names."""
    values = [100 * v for row in shown for v in row.average.values]
    low, high = min(values), max(values)
    room = max(0.12 * (high - low), 1.0)
    return low - room, high + room


def _scatter(
    panel: Axes, base: str, table: Sequence[Row], colours: Colours, labelled: bool
) -> None:
    left, right = panel.get_xlim()
    transform, pixel = panel.transData.transform, panel.figure.dpi / 72
    obstacles = []
    for row in table:
        # below the merge there is room, above the experts likewise
        if row.kind == "experts" or (row.base == base and not row.extra_parameters):
            value = 100 * row.average.mean
            lower = row.kind == "merge"
            panel.axhline(value, color=MUTED if lower else INK, lw=1.1,
                          ls=(0, (4, 3)) if lower else "-", zorder=1)  # fmt: skip
            note = panel.annotate(
                f"{readable(row.method or row.base or row.kind)}  {percent(row.average.mean)}",
                (0, value), xycoords=("axes fraction", "data"), xytext=(3, -4 if lower else 4),
                textcoords="offset points", va="top" if lower else "bottom", fontsize=8,
                color=MUTED if lower else INK, bbox=PLATE,
            )  # fmt: skip
            obstacles.append(note.get_window_extent())
            obstacles += _along(transform([(left, value), (right, value)]), 3 * pixel)
    repairs = {r.method: r for r in table if r.base == base and r.kind == "repair"}
    placed = []
    for family in colours.families():
        members = [repairs[m] for m in family if m in repairs and repairs[m].extra_parameters]
        members.sort(key=lambda r: r.extra_parameters or 0)
        points = [(float(r.extra_parameters or 0), 100 * r.average.mean) for r in members]
        if len(points) > 1:
            hue = colours.colour(members[-1].method or "")
            panel.plot(*zip(*points, strict=True), color=hue, lw=1.6, zorder=2, alpha=0.55)
            obstacles += _along(transform(points), 3 * pixel)
        for row, (x, y) in zip(members, points, strict=True):
            method = row.method or ""
            std = 100 * (row.average.std or 0)
            panel.errorbar(
                x, y, yerr=std or None, fmt=colours.marker(method), color=colours.colour(method),
                ms=7.5, mec=SURFACE, mew=1, elinewidth=1.4, capsize=3, capthick=1.4, zorder=4,
            )  # fmt: skip
            (px, low), (_, high) = transform((x, y - std)), transform((x, y + std))
            half = max((high - low) / 2, pixel)
            middle = (high + low) / 2
            obstacles.append(
                Bbox.from_extents(px - 2 * pixel, middle - half, px + 2 * pixel, middle + half)
            )
            text = f"{readable(method)}\n{percent(row.average.mean, row.average.std)}"
            placed.append((x, y, f"{text}, {count(x)}"))
    if labelled and placed:
        xy = np.array([p[:2] for p in placed], float)
        label_points(panel, xy, [p[2] for p in placed], obstacles)


def _along(points: np.ndarray, thick: float) -> list[Bbox]:
    """Small boxes along a line, in pixels."""
    found = []
    for a, b in itertools.pairwise(points):
        for t in np.linspace(0.1, 0.9, max(int(np.hypot(*(b - a)) / 8), 2)):
            x, y = a + t * (b - a)
            found.append(Bbox.from_bounds(x - thick / 2, y - thick / 2, thick, thick))
    return found


def _dots(
    panel: Axes,
    shown: Sequence[Row],
    heights: Mapping[str, float],
    colours: Colours,
    methods: Sequence[str],
) -> None:
    def values(row: Row) -> dict[str, tuple[float, float]]:
        stats = {**row.accuracy, "average": row.average}
        return {name: (100 * s.mean, 100 * (s.std or 0)) for name, s in stats.items()}

    every = [values(row) for row in shown if row.kind != "pretrained"]
    for name, y in heights.items():
        means = [v[name][0] for v in every]
        panel.hlines(y, min(means), max(means), color=GRID, lw=2.5, zorder=1)
    spread = 0.5 / max(len(methods) - 1, 1) if len(methods) > 2 else 0.16
    for row in shown:
        for name, (mean, std) in values(row).items():
            y = heights[name]
            if row.kind == "merge":
                panel.plot(mean, y, "o", mfc=SURFACE, mec=MUTED, mew=1.3, ms=5.5, zorder=3)
            elif row.kind == "experts":
                panel.plot(mean, y, "|", color=INK, ms=11, mew=1.8, zorder=2)
            elif row.kind == "repair":
                method = row.method or ""
                y += spread * (methods.index(method) - (len(methods) - 1) / 2)
                if std:
                    panel.hlines(y, mean - std, mean + std, color=colours.colour(method), lw=1.1)
                panel.plot(mean, y, colours.marker(method), color=colours.colour(method),
                           mec=SURFACE, mew=0.6, ms=5.8, zorder=4)  # fmt: skip
    panel.axhline(heights["average"] - 0.68, color=GRID, lw=0.8)


def _legend(
    figure: Figure,
    table: Sequence[Row],
    colours: Colours,
    methods: Sequence[str],
    merged: str,
    width: float,
) -> None:
    kinds = {row.kind for row in table}
    handles = []
    if "merge" in kinds:
        handles.append(Line2D([], [], ls="", marker="o", mfc=SURFACE, mec=MUTED, mew=1.3, ms=5.5,
                              label=merged))  # fmt: skip
    handles += _handles(colours, methods)
    if "experts" in kinds:
        handles.append(Line2D([], [], ls="", marker="|", color=INK, ms=10, mew=1.8,
                              label="experts"))  # fmt: skip
    place_legend(figure, handles, width)


def _handles(colours: Colours, methods: Sequence[str]) -> list[Line2D]:
    """The methods in a legend."""
    return [Line2D([], [], ls="", marker=colours.marker(method), ms=6.5, mec=SURFACE, mew=0.6,
                   color=colours.colour(method), label=readable(method))
            for method in methods]  # fmt: skip


def _curves_by_task(result: Result, width: float) -> Figure:
    with style():
        figure, axes = canvas(width, max(3.2, 0.16 * len(result.losses) + 1.2))
        panel = axes[0, 0]
        ends = []
        for task, losses in result.losses.items():
            curve = _smooth(np.asarray(losses))
            panel.plot(curve, color=MUTED, lw=1, alpha=0.6)
            ends.append((float(curve[-1]), readable(task), MUTED))
        mean = _smooth(np.mean(list(result.losses.values()), axis=0))
        panel.plot(mean, color="#0072b2", lw=2.4, zorder=3)
        ends.append((float(mean[-1]), "mean", "#0072b2"))
        _finish_curves(figure, [(panel, ends)], "step (each task)", "loss")
    return figure


def _finish_curves(
    figure: Figure,
    ends: Sequence[tuple[Axes, list[tuple[float, str, str]]]],
    xlabel: str,
    ylabel: str,
) -> None:
    """Axis names, and labels at the lines' right ends, for which the panels make room."""
    for panel, labels in ends:
        panel.margins(x=0.01)
        longest = max(len(text) for _, text, _ in labels)
        # an unseen label makes the layout leave room for those that come
        unseen = "m" * int(0.62 * longest + 2)
        panel.annotate(
            unseen, (1, 0.5), xycoords="axes fraction", xytext=(9, 0),
            textcoords="offset points", fontsize=7.5, alpha=0,
        )  # fmt: skip
    axis_names(figure, [panel for panel, _ in ends], xlabel, ylabel)
    freeze(figure)
    for panel, labels in ends:
        label_ends(panel, labels)


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Running mean over a fortieth of the steps, (steps,) -> (steps,)."""
    half = max(len(losses) // 80, 0)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    at = np.arange(len(losses))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(losses))
    return (total[high] - total[low]) / (high - low)


def _colours(table: Sequence[Row]) -> Colours:
    methods = list(dict.fromkeys(r.method for r in table if r.method))
    # the first hue is the package's own method's
    return Colours(sorted(methods, key=lambda m: not m.startswith("intervmerge")))
