"""What every figure shares: colours, blank panels, axes, labels that do not collide, file formats.

Figures are drawn through matplotlib's objects, never through pyplot's global state. A colour is
one hex value, which a page replaces by a CSS variable: the same drawing is right in light and dark.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker
from matplotlib.ticker import FixedLocator, Formatter, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from ..config import Json
from .formatting import count, readable
from .runs import Row

INK, MUTED, GRID, SURFACE = "#1c2127", "#5c6670", "#dde1e6", "#fffffe"
# Okabe and Ito's colours: told apart by people of any colour vision, and each has its own marker.
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a")
ACCENT = HUES[0]
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_TINTS = (1.0, 0.6, 0.42)
WIDE, NARROW = 7.2, 3.7  # a page shows the one or the other
_BROAD = 10.2  # where three panels stand side by side
DASHES = (0, (4, 3))
# where labels are tried: distances in points, and ways (right, up)
_RINGS = (8, 12, 17, 24, 33, 44, 58)
_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1), (1, 1), (-1, -1))
# behind text that may lie over grid lines
PLATE = {"facecolor": SURFACE, "edgecolor": "none", "pad": 0.6}
# of the two lines of a label
_LINES = ({"color": INK, "fontsize": 8, "weight": "bold"}, {"color": MUTED, "fontsize": 7.5})


def style() -> AbstractContextManager[None]:
    """The figures' look, for the time of a block."""
    return mpl.rc_context(fname=Path(__file__).with_name("report.mplstyle"))


@dataclass(frozen=True)
class Look:
    """How a method is drawn: its name for people, colour, marker and family."""

    label: str
    colour: str
    marker: str
    family: str = ""
    shape: Json = field(default_factory={"mec": SURFACE, "mew": 0.6, "ms": 5.8}.copy)

    @property
    def point(self) -> Json:
        """Settings of a point among others."""
        return {"marker": self.marker, "color": self.colour, "ls": "", **self.shape}

    def handle(self, **line: object) -> Line2D:
        """An entry of a legend: the point, or a line of this colour."""
        look = {"color": self.colour, **line} if line else self.point
        return Line2D([], [], label=self.label, **look)


MERGED = Look("merged", MUTED, "o", "merged", {"mfc": SURFACE, "mew": 1.3, "ms": 5.5})  # a ring
EXPERT = Look("experts", INK, "|", "expert", {"mew": 1.8, "ms": 10})


class Palette(dict[str, Look]):
    """Every method's look, of (name, label, family, size): a hue a family, a tint a size."""

    def __init__(self, methods: Iterable[tuple[str, str, str, float]]):
        super().__init__({"merged": MERGED, "expert": EXPERT})
        # the first hue is the package's own method's
        ordered = sorted(methods, key=lambda method: not method[0].startswith("intervmerge"))
        families: dict[str, dict[str, tuple[str, float]]] = {}
        for name, label, family, size in ordered:
            families.setdefault(family, {}).setdefault(name, (label, size))
        for hue, (family, members) in enumerate(families.items()):
            for tint, name in enumerate(sorted(members, key=lambda name: -members[name][1])):
                colour = _tinted(hue % len(HUES), min(tint, len(_TINTS) - 1))
                self[name] = Look(members[name][0], colour, _MARKERS[hue % len(HUES)], family)
        self.hues = len(families)

    def __missing__(self, name: str) -> Look:
        """Of a model that the results do not describe."""
        hue = self.hues % len(HUES)
        self[name], self.hues = Look(readable(name), HUES[hue], _MARKERS[hue], name), self.hues + 1
        return self[name]

    def families(self, names: Iterable[str]) -> list[list[str]]:
        """The names, those of one family together, the smallest first."""
        found: dict[str, list[str]] = {}
        for name in sorted({name: self[name] for name in names}, key=list(self).index):
            found.setdefault(self[name].family, []).insert(0, name)
        return list(found.values())


@dataclass(frozen=True)
class Canvas:
    """What a figure is drawn for: a width in inches, and the methods' looks."""

    width: float
    palette: Palette
    INK, MUTED, GRID, SURFACE, PLATE = INK, MUTED, GRID, SURFACE, PLATE
    readable = staticmethod(readable)

    @property
    def wide(self) -> bool:
        """Whether panels have room beside each other."""
        return self.width >= WIDE

    def panels(
        self,
        number: int = 1,
        high: float = 3.2,
        more: float = 0,
        columns: tuple[int, int] = (1, 3),
        sharex: bool = False,
        sharey: bool = False,
    ) -> Panels:
        """A blank figure of ``number`` panels.

        Args:
            high, more: inches of a line of panels, and more for all together.
            columns: at most so many where it is narrow, and where it is wide.
            sharex, sharey: whether all panels have one axis.
        """
        beside = min(number, columns[self.wide])
        lines = math.ceil(number / beside)
        width = _BROAD if beside > 2 and columns == (1, 3) else self.width
        figure = Figure(figsize=(width, high * lines + more))
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, beside, squeeze=False, sharex=sharex, sharey=sharey).flat
        for spare in axes[number:]:
            spare.remove()
        return Panels(figure, list(axes[:number]), beside)

    def dots(
        self,
        shown: Mapping[str, pd.DataFrame],
        deviations: Mapping[str, pd.DataFrame] | None = None,
        percent: Collection[str] = (),
        merged: str = "merged",
    ) -> Figure:
        """Rows of tasks, a point an encoder, and a bar from the lowest to the highest.

        Args:
            shown: a panel's title -> values; a row a task, the last one their mean; a column an
                encoder: ``merged`` (called so in the legend), methods, ``expert``.
            deviations: the same of standard deviations; the methods stand above each other then.
            percent: titles of the panels of percentages.
        """
        names = list(dict.fromkeys(itertools.chain.from_iterable(shown.values())))
        methods = [name for name in names if name not in ("merged", "expert")]
        spread = 0.5 / max(len(methods) - 1, 1) if len(methods) > 2 else 0.16
        rows = list(next(iter(shown.values())).index)
        high = max(0.27, 0.09 * len(methods)) * len(rows) + 0.7
        panels = self.panels(len(shown), high, 0.35, sharex=deviations is not None)
        y = np.arange(len(rows)) + 0.35 * (np.arange(len(rows)) == len(rows) - 1)
        for (title, values), panel in zip(shown.items(), panels.axes, strict=True):
            panels.rows(panel, y, list(map(readable, rows)))
            panel.axhline(y[-1] - 0.68, color=GRID, lw=0.8)
            panel.get_yticklabels()[-1].set_fontweight("bold")
            panel.hlines(y, values.min(axis=1), values.max(axis=1), color=GRID, lw=2.5, zorder=1)
            for name in values:
                look, at = self.palette[name], y
                if deviations is not None and name in methods:
                    at = y + spread * (methods.index(name) - (len(methods) - 1) / 2)
                    low, high = (values[name] + s * deviations[title][name] for s in (-1, 1))
                    panel.hlines(at, low, high, color=look.colour, lw=1.1)
                panel.plot(values[name], at, **look.point, zorder=2 + (name in methods))
            panel.set_title(title)
            if title in percent:
                panels.percent(panel.xaxis, 4 if panels.columns > 2 else 6)
        looks = {**self.palette, "merged": replace(MERGED, label=merged)}
        return panels.finish([looks[name].handle() for name in names])

    def curves(self, curves: Mapping[str, pd.DataFrame], x: str, y: str) -> Figure:
        """Every encoder's curve along the index, a panel a column after one of their mean.

        ``x`` and ``y`` name the axes; heights are distances, or percentages of accuracy, agreement.
        """
        shown, lines = {}, dict[str, Json]()
        for name, values in curves.items():
            means = pd.DataFrame({"mean over tasks": values.mean(axis=1)})
            shown[name] = means.join(values) if len(values.columns) > 1 else values
            marker, colour = "o" if len(values) <= 50 else "", self.palette[name].colour
            lines[name] = {"color": colour, "marker": marker, "lw": 1.4, "ms": 2.8}
            if name == "merged":  # over the others: some repairs leave every block as it was
                lines[name] |= {"ls": (0, (2, 1.5)), "zorder": 3}
        titles = list(shown[name])
        high, more = (1.55, 0.65) if len(titles) > 1 else (3.2, 0.0)
        panels = self.panels(len(titles), high, more, (2, 3), sharex=True, sharey=True)
        for title, panel in zip(titles, panels.axes, strict=True):
            for name, values in shown.items():
                panel.plot(values[title], **lines[name])
            weight = "bold" if title == titles[0] else "normal"
            panel.set_title(readable(title) if len(titles) > 1 else "", size=8.5, weight=weight)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.tick_params(labelbottom=True)
        if y in ("accuracy", "agreement"):
            panels.percent(panels.axes[0].yaxis)
        else:
            panels.axes[0].set_ylim(bottom=0)  # of all: once every curve is there
        panels.named(x, y)
        handles = [self.palette[name].handle(**line) for name, line in lines.items()]
        return panels.finish(handles, gap=0.6)


@dataclass(frozen=True)
class Panels:
    """A figure and its panels, row by row, so many ``columns`` side by side."""

    figure: Figure
    axes: list[Axes]
    columns: int

    def named(self, x: str, y: str) -> None:
        """Axis names, once for all panels."""
        if len(self.axes) == 1:
            self.axes[0].set(xlabel=x, ylabel=y)
        else:
            self.figure.supxlabel(x, fontsize=8.5, color=MUTED)
            self.figure.supylabel(y, fontsize=8.5, color=MUTED)

    def rows(self, panel: Axes, heights: Sequence[float], labels: Sequence[str]) -> None:
        """Horizontal lines, named by the first panel of each line of panels."""
        first = self.axes.index(panel) % self.columns == 0
        panel.set_yticks(heights, labels if first else [""] * len(labels))
        panel.set_ylim(heights[-1] + 0.6, -0.6)
        panel.tick_params(axis="y", labelcolor=INK)
        panel.tick_params(axis="x", length=0, labelbottom=True)
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", visible=True)
        panel.spines["bottom"].set_visible(False)

    @staticmethod
    def percent(axis: Axis, ticks: int = 6, integer: bool = False) -> None:
        """An axis whose numbers are percentages."""
        axis.set_major_formatter("{x:g}%")
        axis.set_major_locator(MaxNLocator(ticks, integer=integer, steps=(1, 2, 2.5, 5, 10)))

    @staticmethod
    def reference(panel: Axes, row: Row, of: str = "average", text: bool = True) -> None:
        """A line at the merge's accuracy (dashed, its name below), or the experts' (name above)."""
        merge, value = row.kind == "merge", 100 * row.mean[of]
        colour, down, va = (MUTED, -4, "top") if merge else (INK, 4, "bottom")
        panel.axhline(value, color=colour, lw=1.1, ls=DASHES if merge else "-", zorder=1)
        if text:
            place: Json = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            look: Json = {"color": colour, "va": va, "fontsize": 8, "bbox": PLATE}
            panel.annotate(f"{row.label}  {value:.1f}", (0, value), (3, down), **place, **look)

    def finish(self, handles: Sequence[Line2D] = (), gap: float = 0.2) -> Figure:
        """A legend above the panels, in as many columns as fit, and the layout settled.

        Labels can then be placed in pixels, and the figure is written quickly, however often.
        """
        if handles:
            longest = max(len(str(handle.get_label())) for handle in handles)
            width = self.figure.get_figwidth() * 72 - 100 * gap + 20
            columns = max(1, min(len(handles), int(width / (4.6 * longest + 32))))
            place: Json = {"loc": "outside upper left", "ncols": columns, "handletextpad": gap}
            self.figure.legend(handles=handles, **place)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")
        return self.figure


def centred(
    panel: Axes, at: tuple[float, float], text: str, colour: str, weight: str = "normal"
) -> None:
    """A number in the middle of a square."""
    place: Json = {"ha": "center", "va": "center"}
    panel.text(*at, text, fontsize=7.5, color=colour, weight=weight, **place)


def number_axis(
    panel: Axes, ticks: Sequence[float], log: bool, words: str | Formatter = "{x:g}"
) -> None:
    """An axis with these ticks and no others."""
    panel.set_xscale("log" if log else "linear")
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(words)


def parameter_axis(panel: Axes, values: Iterable[float]) -> None:
    """A log axis of parameter counts, with a few round ticks around the values."""
    low, high = np.log10([min(values), max(values)])
    margin = max(0.25 * (high - low), 0.35)
    left, right = 10 ** (low - margin), 10 ** (high + margin)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in range(-1, 16) for s in steps if left <= s * 10.0**e <= right]
        if len(ticks) <= 6:
            break
    number_axis(panel, ticks, True, FuncFormatter(lambda v, _: count(v).replace(".0", "")))
    panel.set_xlim(left, right)


def label_points(panel: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels (x, y, name, rest) beside points, clear of points, lines and each other.

    The panel has its final limits and position, and all that the labels must not cover. Places lie
    on rings around a point; the nearest that covers least is taken.
    """
    pixel, frame = panel.figure.dpi / 72, panel.get_window_extent()
    lines = [line.get_transform().transform_path(line.get_path()) for line in panel.lines]
    for bars in panel.collections:
        lines += [bars.get_transform().transform_path(path) for path in bars.get_paths()]
    anchors = panel.transData.transform([label[:2] for label in labels])
    taken = [text.get_window_extent() for text in panel.texts]
    taken += [Bbox([anchor, anchor]).padded(6 * pixel) for anchor in anchors]

    def cost(box: Bbox) -> float:
        inside = frame.contains(*box.min) and frame.contains(*box.max)
        across = sum(path.intersects_bbox(box, filled=False) for path in lines)
        return 20 * box.padded(2).count_overlaps(taken) + 6 * across + 50 * (not inside)

    sides: Mapping[int, Any] = {1: "left", 0: "center", -1: "right"}
    look: Json = {"boxcoords": "offset points", "annotation_clip": False}
    look |= {"pad": 0.07, "bboxprops": {"fc": SURFACE, "ec": "none"}}
    arrow: Json = {"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkA": 1, "shrinkB": 5}
    for (x, y, *words), anchor in zip(labels, anchors, strict=True):
        texts = [TextArea(word, textprops=line) for word, line in zip(words, _LINES, strict=True)]
        label = VPacker(children=[*texts])
        label.set_figure(panel.figure)
        size = label.get_window_extent().size
        places = []
        for ring, way in itertools.product(_RINGS, np.array(_WAYS)):
            away = ring * pixel * (0.75 if way.all() else 1)
            corner = anchor + away * way + size * (way - 1) / 2
            places.append((Bbox([corner, corner + size]), way, away / pixel * way))
        costs = [cost(box) + 0.3 * i for i, (box, *_) in enumerate(places)]
        box, way, at = places[int(np.argmin(costs))]
        taken.append(box)
        label.align = sides[way[0]]
        corner, away = tuple((1 - way) / 2), np.hypot(*at)
        look |= {"box_alignment": corner, "arrowprops": None, "zorder": 6}
        if away > 14:  # the longer an arrow, the lower: it lies below what it passes
            look |= {"arrowprops": {**arrow, "relpos": corner}, "zorder": 3 - away / 100}
        panel.add_artist(AnnotationBbox(label, (x, y), tuple(at), **look))


def to_files(figure: Figure, name: str) -> dict[str, bytes]:
    """The figure as ``name.png``, sharp enough for a slide, and ``name.svg``, on a white ground."""
    return {f"{name}.png": _written(figure, "png", dpi=220), f"{name}.svg": _written(figure, "svg")}


def to_inline_svg(figure: Figure, name: str, alternative: str) -> str:
    """The figure as an ``<svg>`` element whose colours are the page's.

    Its ids begin with ``name``, which is unique in the page; ``alternative`` says what it shows.
    """
    figure.patch.set_alpha(0)
    svg = _written(figure, "svg").decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in _variables().items():
        svg = svg.replace(colour, variable)
    # drawn as wide as the page allows, up to a size at which its text is as large as the page's
    size = f'style="max-width: {round(118 * figure.get_figwidth())}px"'
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    label = html.escape(alternative, quote=True)
    return f'{head} role="img" aria-label="{label}" {size}>{rest}'


def _written(figure: Figure, form: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format=form, metadata={"Date": None}, **how)
    return stream.getvalue()


def _tinted(hue: int, tint: int) -> str:
    red, green, blue = (1 - _TINTS[tint] * (1 - part) for part in to_rgb(HUES[hue]))
    return to_hex((red, green, blue))


def _variables() -> dict[str, str]:
    """Hex colour -> what the page writes in its place."""
    names = {INK: "ink", MUTED: "muted", GRID: "line", SURFACE: "surface"}
    found = {colour: f"var(--{name})" for colour, name in names.items()}
    for hue, (tint, share) in itertools.product(range(len(HUES)), enumerate(_TINTS)):
        plain = f"var(--hue-{hue})"
        mixed = f"color-mix(in srgb, {plain} {share:.0%}, var(--surface))"
        found[_tinted(hue, tint)] = plain if tint == 0 else mixed
    return found
