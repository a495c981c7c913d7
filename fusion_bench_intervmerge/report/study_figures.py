"""The figures of a study: settings side by side, or along an axis of numbers, or task by task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from .drawing import (
    INK,
    MUTED,
    PERCENT,
    PLATE,
    SURFACE,
    Colours,
    axis_names,
    canvas,
    keep_panels,
    parameter_axis,
    place_legend,
    style,
)
from .tables import Row
from .words import percent, readable

Settings = Sequence[tuple[dict[str, str], Row]]
Reference = Callable[..., Row | None]
Draw = Callable[[float], Figure]


def draw(about: Mapping[str, Any], settings: Settings, reference: Reference) -> list[Draw]:
    """The figures that fit the study, for any width in inches; none before a setting is finished.

    Args:
        about: see ``study.Grid``.
        settings: labels and results of every setting.
        reference: gives the row of ``experts``, ``pretrained`` or (``merge``, base).
    """
    if not settings:
        return []
    average, tasks = (_curves, _curves_by_task) if about.get("x") else (_side_by_side, _gains)
    wanted = [average, tasks] if about.get("by_task") else [average]

    def bound(make: Callable[..., Figure]) -> Draw:
        def drawn(width: float) -> Figure:
            with style():
                return make(about, settings, reference, width)

        return drawn

    return [bound(make) for make in wanted]


def _side_by_side(
    about: Mapping[str, Any], settings: Settings, reference: Reference, width: float
) -> Figure:
    """Average accuracy of each setting, a panel a base."""
    bases = list(dict.fromkeys(labels["base"] for labels, _ in settings))
    names = list(dict.fromkeys(row.method or "" for _, row in settings))
    figure, axes = canvas(width, 0.3 * len(names) + 0.95, 1, len(bases), sharey=True)
    for base, panel in zip(bases, axes[0], strict=True):
        for labels, row in settings:
            if labels["base"] != base:
                continue
            y, mean = names.index(row.method or ""), 100 * row.average.mean
            std = 100 * (row.average.std or 0)
            panel.errorbar(mean, y, xerr=std or None, fmt="o", color="#0072b2", ms=6.5, mec=SURFACE,
                           mew=0.8, capsize=3, elinewidth=1.3, zorder=3)  # fmt: skip
            panel.annotate(percent(row.average.mean, row.average.std), (mean + std, y),
                           xytext=(7, 0), textcoords="offset points", va="center", fontsize=7.5,
                           color=MUTED)  # fmt: skip
        panel.set_yticks(range(len(names)), names)
        panel.tick_params(axis="y", labelcolor=INK)
        panel.set_ylim(len(names) - 0.4, -0.6)
        _vertical_references(panel, reference("merge", base), reference("experts"))
        left, right = panel.get_xlim()
        # room for the last number; there is no accuracy beyond 100
        panel.set_xlim(left, max(right + 0.06 * (right - left), 100) if right > 80 else right * 1.1)
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", visible=True)
        panel.xaxis.set_major_formatter(PERCENT)
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.set_title(readable(base) if len(bases) > 1 else "")
    axes[0, 0].set_xlabel("average accuracy over tasks")
    return figure


def _curves(
    about: Mapping[str, Any], settings: Settings, reference: Reference, width: float
) -> Figure:
    """Average accuracy along the axis ``x``, a curve a series."""
    figure, axes = canvas(width, 3.7)
    panel = axes[0, 0]
    series = _series(about, settings)
    colours = Colours(list(series))
    for name, points in series.items():
        x = [at for at, _ in points]
        mean = [100 * row.average.mean for _, row in points]
        std = [100 * (row.average.std or 0) for _, row in points]
        panel.errorbar(x, mean, yerr=std, fmt="-", marker=colours.marker(name),
                       color=colours.colour(name), ms=6.5, mec=SURFACE, mew=0.8, lw=1.6, capsize=3,
                       elinewidth=1.2, zorder=3)  # fmt: skip
    bases = list(dict.fromkeys(labels["base"] for labels, _ in settings))
    merge = reference("merge", bases[0]) if len(bases) == 1 else None
    _horizontal_references(panel, [("merge", merge), ("experts", reference("experts"))])
    _number_axis(panel, about, [at for points in series.values() for at, _ in points])
    panel.margins(y=0.1)
    axis_names(figure, [panel], _axis_name(about), "average accuracy over tasks")
    _percent_axis(panel)
    _legend(figure, series, colours, width)
    return figure


def _curves_by_task(
    about: Mapping[str, Any], settings: Settings, reference: Reference, width: float
) -> Figure:
    """The same, a panel a task, each with the merge's and the expert's accuracy."""
    series = _series(about, settings)
    colours = Colours(list(series))
    tasks = list(settings[0][1].accuracy)
    columns = min(4 if width > 5 else 2, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure, axes = canvas(width, 1.75 * lines + 0.6, lines, columns, sharex=True)
    panels = keep_panels(axes, len(tasks))
    for task, panel in zip(tasks, panels, strict=True):
        for name, points in series.items():
            stats = [row.accuracy[task] for _, row in points]
            panel.errorbar([at for at, _ in points], [100 * s.mean for s in stats],
                           yerr=[100 * (s.std or 0) for s in stats],
                           fmt=f"-{colours.marker(name)}", color=colours.colour(name), ms=4, lw=1.3,
                           capsize=2, elinewidth=1)  # fmt: skip
        merge, experts = reference("merge", settings[0][0]["base"]), reference("experts")
        for row, dashes in ((merge, (0, (4, 3))), (experts, "-")):
            if row is not None:
                panel.axhline(100 * row.accuracy[task].mean, color=MUTED, lw=1, ls=dashes, zorder=1)
        _number_axis(panel, about, [at for points in series.values() for at, _ in points], most=3)
        panel.set_title(readable(task), fontsize=8.5)
        _percent_axis(panel)
    axis_names(figure, panels, _axis_name(about), "accuracy")
    lines_of = [Line2D([], [], color=MUTED, lw=1, ls=(0, (4, 3)), label="the merge"),
                Line2D([], [], color=MUTED, lw=1, label="the expert")]  # fmt: skip
    _legend(figure, series if len(series) > 1 else {}, colours, width, lines_of)
    return figure


def _gains(
    about: Mapping[str, Any], settings: Settings, reference: Reference, width: float
) -> Figure:
    """What each setting gains over the merge, task by task, in percentage points."""
    names = [row.method or "" for _, row in settings]
    tasks = [*settings[0][1].accuracy, "average"]
    gains = np.full((len(names), len(tasks)), np.nan)
    for i, (labels, row) in enumerate(settings):
        merge = reference("merge", labels["base"])
        if merge is not None:
            own = [*row.accuracy.values(), row.average]
            its = [*merge.accuracy.values(), merge.average]
            gains[i] = [100 * (a.mean - b.mean) for a, b in zip(own, its, strict=True)]
    figure, axes = canvas(width, 0.32 * len(names) + 0.9)
    panel = axes[0, 0]
    limit = float(np.nanmax(np.abs(gains))) if np.isfinite(gains).any() else 1.0
    panel.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), gain in np.ndenumerate(gains):
        panel.text(j, i, f"{gain:+.1f}", ha="center", va="center", fontsize=7.5,
                   color="white" if abs(gain) > 0.6 * limit else INK)  # fmt: skip
    panel.set_yticks(range(len(names)), names)
    panel.set_xticks(range(len(tasks)), [readable(t) for t in tasks])
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelcolor=INK)
    panel.grid(visible=False)
    panel.spines["bottom"].set_visible(False)
    panel.set_xlabel("percentage points gained over the merge")
    return figure


# -- parts -----------------------------------------------------------------------------------------


def _series(about: Mapping[str, Any], settings: Settings) -> dict[str, list[tuple[float, Row]]]:
    """Curves by name: points (x, results) in ascending order."""
    x = about["x"]
    several = len({labels["base"] for labels, _ in settings}) > 1
    found: dict[str, list[tuple[float, Row]]] = {}
    for labels, row in settings:
        if x == "extra_parameters":
            at = float(row.extra_parameters or 0)
            # "Surgery r=4", "Closed form, budget of 6192": what comes before the size
            name = re.split(r" r=| of ", row.method or "")[0]
        else:
            at = float(labels[x])
            rest = [v for axis, v in labels.items() if axis not in (x, "base")]
            name = ", ".join([*rest, *([readable(labels["base"])] if several else [])])
        found.setdefault(name, []).append((at, row))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in found.items()}


def _number_axis(
    panel: Axes, about: Mapping[str, Any], values: Sequence[float], most: int = 8
) -> None:
    """Ticks at the values themselves, ``most`` of them."""
    if about["x"] == "extra_parameters":
        parameter_axis(panel, values)
        return
    ticks = sorted(set(values))
    ticks = ticks[:: math.ceil(len(ticks) / most)]
    if about.get("log"):
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_major_formatter("{x:g}")


def _axis_name(about: Mapping[str, Any]) -> str:
    return about.get("xlabel") or str(about["x"]).replace("_", " ")


def _percent_axis(panel: Axes) -> None:
    panel.yaxis.set_major_formatter(PERCENT)
    panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _vertical_references(panel: Axes, merge: Row | None, experts: Row | None) -> None:
    for row, dashes in ((merge, (0, (4, 3))), (experts, "-")):
        if row is None:
            continue
        mean = 100 * row.average.mean
        panel.axvline(mean, color=MUTED, lw=1, ls=dashes, zorder=1)
        panel.annotate(
            f"{readable(row.base or row.kind)} {mean:.1f}", (mean, 1),
            xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=7.5, color=MUTED,
        )  # fmt: skip


def _horizontal_references(panel: Axes, rows: Sequence[tuple[str, Row | None]]) -> None:
    for name, row in rows:
        if row is None:
            continue
        mean = 100 * row.average.mean
        panel.axhline(mean, color=MUTED, lw=1, ls=(0, (4, 3)) if name == "merge" else "-", zorder=1)
        panel.annotate(
            f"{readable(row.base or row.kind)} {mean:.1f}", (1, mean),
            xycoords=("axes fraction", "data"), xytext=(-3, -3 if name == "merge" else 3),
            textcoords="offset points", fontsize=7.5, color=MUTED, ha="right", bbox=PLATE,
            va="top" if name == "merge" else "bottom",
        )  # fmt: skip


def _legend(
    figure: Figure,
    series: Mapping[str, Any],
    colours: Colours,
    width: float,
    more: Sequence[Line2D] = (),
) -> None:
    handles = [Line2D([], [], color=colours.colour(n), marker=colours.marker(n), lw=1.6, ms=5.5,
                      label=readable(n)) for n in series]  # fmt: skip
    handles += more
    if len(handles) > 1:
        place_legend(figure, handles, width, gap=0.5)
