"""What every figure shares: colours, blank panels, axes, two common drawings, file formats.

Figures are drawn through matplotlib's objects, never through pyplot's global state. Each is one
drawing for a page in light or dark: its ground is transparent, its hues have contrast on both
grounds, and its ink is written as ``currentColor``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..config import Json
from .formatting import count, family, readable
from .runs import Row

Colour: TypeAlias = tuple[float, float, float, float]

INK, GREY = "#1c2127", "#808a95"
# a family of methods -> its place in HUES, the same in every picture
FAMILIES = {
    "intervmerge": 0,
    "closed_form": 1,
    "intervmerge_closed_form": 1,
    "calibration": 2,
    "calibrated": 2,
    "intervmerge_calibrated": 2,
    "surgery": 3,
    "surgery_v2": 4,
    "all_tokens": 5,
    "featcal": 6,
}
HUES = (
    "#2a7fc1",  # blue
    "#d9631e",  # orange
    "#0f9d73",  # green
    "#cc6fa3",  # pink
    "#8468c4",  # purple
    "#2aa1b8",  # teal
    "#b08a1e",  # ochre
)
_OTHERS = ("#a8674a", "#d14f5a", "#7d9c2f", "#6f7fa8")  # brown, red, olive, slate
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_SHADES = (1.0, 0.65, 0.45)
DASHES = (0, (4, 3))
WIDTH = 7.2  # inches


@dataclass(frozen=True)
class Picture:
    """A figure with its heading and words; ``name`` is its anchor in a page, and its file's."""

    name: str
    title: str
    text: str
    figure: Figure


@dataclass(frozen=True)
class Look:
    """How a model is drawn: its name for people, and matplotlib's settings of its points."""

    label: str
    colour: str | Colour
    point: Json

    def handle(self, label: str = "", **line: Any) -> Line2D:
        """An entry of a legend: the point, or a line of this colour."""
        settings = {"color": self.colour, **line} if line else self.point
        return Line2D([], [], label=label or self.label, **settings)


MERGED = Look("merged", GREY, {"color": GREY, "marker": "o", "ls": "", "mfc": "none", "mew": 1.4})
EXPERT = Look("experts", INK, {"color": INK, "marker": "|", "ls": "", "mew": 1.8, "ms": 10})


class Palette(dict[str, Look]):
    """Every method's look, from (name, label, size): one hue per family, the largest strongest.

    A method without an extra parameter is hollow, as the merge is.
    """

    def __init__(self, methods: Iterable[tuple[str, str, float]] = ()):
        super().__init__({"merged": MERGED, "expert": EXPERT})
        self._members: dict[str, list[str]] = {}  # family -> its methods, the largest first
        self._places: dict[str, int] = {}  # family -> its place among the hues
        for name, label, size in sorted(methods, key=lambda method: -method[2]):
            self._add(name, label, hollow=size == 0)

    def __missing__(self, name: str) -> Look:
        """A model that the results do not describe."""
        self._add(name, readable(name))
        return self[name]

    def _add(self, name: str, label: str, hollow: bool = False) -> None:
        own = family(name)
        members = self._members.setdefault(own, [])
        others = sum(place >= len(HUES) for place in self._places.values())
        key = re.sub(r"\W+", "_", own).lower()
        place = self._places.setdefault(own, FAMILIES.get(key, len(HUES) + others))
        hue = (HUES + _OTHERS * (1 + place // len(_OTHERS)))[place]
        colour = to_rgba(hue, _SHADES[min(len(members), len(_SHADES) - 1)])
        marker = _MARKERS[place % len(_MARKERS)]
        point = {"color": colour, "marker": marker, "ls": "", "mew": 0, "ms": 6.2}
        if hollow:
            point |= {"mfc": "none", "mew": 1.4, "ms": 5.4}
        self[name] = Look(label, colour, point)
        members.append(name)

    def families(self, names: Iterable[str]) -> list[list[str]]:
        """The names, those of one family together, the smallest first."""
        wanted = {name: self[name] for name in names}
        ordered = sorted(self._members, key=self._places.__getitem__)
        groups = [[n for n in self._members[own][::-1] if n in wanted] for own in ordered]
        return [group for group in groups if group]


# -- blank figures and their axes ------------------------------------------------------------------


def blank(
    number: int = 1, high: float = 3.2, columns: int = 3, sharex: bool = False, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` panels, each ``high`` inches, at most ``columns`` side by side."""
    beside = min(number, columns)
    lines = math.ceil(number / beside)
    figure = Figure(figsize=(WIDTH, high * lines + 0.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, beside, squeeze=False, sharex=sharex, sharey=sharey).flat
    for spare in axes[number:]:
        spare.remove()
    for panel in axes[:number]:
        panel.tick_params(labelbottom=True)
    return figure, list(axes[:number])


def name_axes(figure: Figure, x: str, y: str) -> None:
    """Axis names, once for all panels."""
    figure.supxlabel(x, fontsize=8.5)
    figure.supylabel(y, fontsize=8.5)


def rows(panel: Axes, heights: Sequence[float], labels: Sequence[str]) -> None:
    """Horizontal lines with names, from above to below."""
    panel.set_yticks(heights, labels)
    panel.set_ylim(heights[-1] + 0.6, -0.6)
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="y", visible=False)
    panel.grid(axis="x", visible=True)
    panel.spines["bottom"].set_visible(False)


def percent_axis(axis: Axis, ticks: int = 6, integer: bool = False) -> None:
    """An axis whose numbers are percentages."""
    axis.set_major_formatter("{x:g}%")
    axis.set_major_locator(MaxNLocator(ticks, integer=integer, steps=(1, 2, 2.5, 5, 10)))


def size_axis(panel: Axes, sizes: Iterable[float]) -> None:
    """A log axis of parameter counts or bytes, with a place for 0."""
    sizes = {float(size) for size in sizes}
    low = min((size for size in sizes if size), default=1.0)
    if 0.0 in sizes:
        panel.set_xscale("symlog", linthresh=low / 2, linscale=0.4)
        ticks = [step * 10.0**e for e in range(16) for step in (1, 3)]
        panel.xaxis.set_major_locator(FixedLocator([0, *(tick for tick in ticks if tick > low)]))
    else:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.set_xlim(low / 1.5, max(sizes) * 1.5)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: count(size)))


def references(
    of: Iterable[tuple[Axes, Sequence[Row], str]], upright: bool = False
) -> list[Line2D]:
    """Lines at accuracies: of panels, the rows of a merge (dashed) and the experts, and which.

    Returns:
        Their entries of a legend, with the numbers if there is one panel.
    """
    drawn, names = list(of), {"merge": "the merge", "experts": "the experts"}
    handles = {}
    for panel, lines, name in drawn:
        for row in lines:
            merge, value = row.kind == "merge", 100 * row.mean[name]
            look: Json = {
                "color": GREY if merge else INK,
                "ls": DASHES if merge else "-",
                "lw": 1.1,
            }
            (panel.axvline if upright else panel.axhline)(value, zorder=1, **look)
            label = f"{row.label} {value:.1f}" if len(drawn) == 1 else names[row.kind]
            handles[row.kind] = Line2D([], [], label=label, **look)
    return list(handles.values())


def squares(
    panel: Axes, table: pd.DataFrame, strength: np.ndarray, words: Callable[[float], str]
) -> None:
    """A heat map: a square per number, blue above zero, orange below, as strong as in [-1, 1]."""
    colours = np.where(strength[..., None] < 0, to_rgba(HUES[1]), to_rgba(HUES[0]))
    colours[..., 3] = 0.4 * np.nan_to_num(np.abs(strength))
    panel.imshow(colours, aspect="auto")
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        panel.text(j, i, words(value), ha="center", va="center", fontsize=7.5)
    panel.set_yticks(range(len(table)), list(map(readable, table.index)))
    panel.set_xticks(range(len(table.columns)), list(map(readable, table)))
    if len(table.columns) > 10:
        panel.tick_params(axis="x", labelrotation=90)
    panel.tick_params(length=0)
    panel.grid(visible=False)
    panel.spines["bottom"].set_visible(False)


def finish(figure: Figure, handles: Sequence[Line2D] = (), gap: float = 0.2) -> Figure:
    """A legend above the panels, in as many columns as fit, and the layout settled.

    The figure is then written quickly, in however many formats.
    """
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        fit = int((72 * WIDTH + 20 - 100 * gap) / (4.7 * longest + 32))
        columns = max(1, min(len(handles), fit))
        figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(handles) / columns))
        place: Json = {"loc": "outside upper left", "ncols": columns, "handletextpad": gap}
        figure.legend(handles=list(handles), **place)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


# -- drawings that several figures share -----------------------------------------------------------


def dots(
    palette: Palette,
    shown: Mapping[str, pd.DataFrame],
    deviations: Mapping[str, pd.DataFrame] | None = None,
    percent: Collection[str] = (),
) -> Figure:
    """Tasks from above to below, a point per encoder, and a bar from the lowest to the highest.

    Args:
        palette: the encoders' looks.
        shown: a panel's title -> values; a row per task, the last one their mean; a column per
            encoder: ``merged``, methods, ``expert``.
        deviations: the same of standard deviations; methods stand above each other then.
        percent: titles of the panels of percentages.
    """
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    methods = [name for name in names if name not in ("merged", "expert")]
    apart = 0.5 / max(len(methods) - 1, 1) if len(methods) > 2 else 0.16
    tasks = list(next(iter(shown.values())).index)
    high = max(0.27, 0.09 * len(methods)) * len(tasks) + 0.6
    figure, axes = blank(len(shown), high, sharex=deviations is not None)
    y = np.arange(len(tasks)) + 0.35 * (np.arange(len(tasks)) == len(tasks) - 1)
    for (title, values), panel in zip(shown.items(), axes, strict=True):
        rows(panel, y, list(map(readable, tasks)))
        bars: Json = {"color": GREY, "alpha": 0.25, "lw": 2.5, "zorder": 1}
        panel.hlines(y, values.min(axis=1), values.max(axis=1), **bars)
        panel.axhline(y[-1] - 0.68, color=GREY, lw=0.8, alpha=0.4)
        for name in values:
            look, at = palette[name], y
            if deviations is not None and name in methods:
                at = y + apart * (methods.index(name) - (len(methods) - 1) / 2)
                spread = deviations[title][name].fillna(0)
                panel.errorbar(
                    values[name], at, xerr=spread, fmt="none", ecolor=look.colour, lw=1.1
                )
            panel.plot(values[name], at, **look.point, zorder=2 + (name in methods))
        panel.set_title(title)
        if title in percent:
            percent_axis(panel.xaxis, 4 if len(shown) > 2 else 6)
    axes[0].get_yticklabels()[-1].set_fontweight("bold")
    return finish(figure, [palette[name].handle() for name in names])


def curves(palette: Palette, shown: Mapping[str, pd.DataFrame], x: str, y: str) -> Figure:
    """Every encoder's curve along the index: a panel of the mean, then one per column.

    ``x`` and ``y`` name the axes; heights are distances, or percentages of accuracy, agreement.
    """
    lines: dict[str, Json] = {}
    for name, values in shown.items():
        marker = "o" if len(values) <= 50 else ""
        lines[name] = {"color": palette[name].colour, "marker": marker, "lw": 1.4, "ms": 2.8}
        if name == "merged":  # over the others: some repairs leave every block as it was
            lines[name] |= {"ls": (0, (2, 1.5)), "zorder": 3}
    tasks = list(next(iter(shown.values())))
    titles = ["mean over tasks", *tasks] if len(tasks) > 1 else tasks
    figure, axes = blank(len(titles), 1.6 if len(titles) > 1 else 3.2, sharex=True)
    for title, panel in zip(titles, axes, strict=True):
        for name, values in shown.items():
            curve = values[title] if title in values else values.mean(axis=1)
            panel.plot(curve, **lines[name])
        panel.set_title(readable(title) if len(titles) > 1 else "")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if y in ("accuracy", "agreement"):
        percent_axis(axes[0].yaxis)
    else:
        axes[0].set_ylim(bottom=0)  # all panels': once every curve is there
    name_axes(figure, x, y)
    return finish(figure, [palette[name].handle(**line) for name, line in lines.items()], gap=0.6)


# -- files -----------------------------------------------------------------------------------------


def style() -> AbstractContextManager[None]:
    """The figures' look, for the time of a block."""
    return mpl.rc_context(fname=Path(__file__).with_name("report.mplstyle"))


def to_svg(figure: Figure) -> bytes:
    """The figure on a transparent ground; its ink is a mid-tone unless a page sets ``color``."""
    plain: Json = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    svg = _written(figure, "svg", metadata=plain).replace(INK.encode(), b"currentColor")
    return svg.replace(b"<svg ", b'<svg color="#6b7280" ', 1)


def to_png(figure: Figure) -> bytes:
    """The figure on white, sharp enough for a slide."""
    return _written(figure, "png", dpi=220, facecolor="white")


def _written(figure: Figure, form: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format=form, **how)
    return stream.getvalue()
