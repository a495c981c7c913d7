"""What every figure shares: colours, a blank canvas, labels that do not collide, file formats.

Figures are drawn through matplotlib's objects, never through pyplot's global state. A colour is
one hex value, which a page replaces by a CSS variable: the same drawing is right in light and dark.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from .words import count, family_and_budget, family_and_rank

INK, MUTED, GRID, SURFACE = "#1c2127", "#5c6670", "#dde1e6", "#fffffe"
# Okabe and Ito's colours: told apart by people of any colour vision, and each has its own marker.
_FAMILIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a")
HUES = len(_FAMILIES)
_FAMILY_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_FAMILIES_IN_THE_DARK = (
    "#4db2f0",
    "#ff8b4a",
    "#33c79c",
    "#e69ac6",
    "#f2b632",
    "#8fd0f5",
    "#a98fd8",
)
_TINTS = (1.0, 0.6, 0.42)
WIDE, NARROW = 7.2, 3.7  # a page shows the one or the other
_BROAD = 10.2  # where three panels stand side by side
PERCENT = "{x:g}%"  # ticks of an axis whose numbers are percentages
# behind text that may lie over grid lines
PLATE = {"facecolor": SURFACE, "edgecolor": "none", "pad": 0.6}

_RC: Any = {
    "font.family": "DejaVu Sans",  # it ships with matplotlib: the same figure everywhere
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # names are names
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": SURFACE,
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",
    "svg.hashsalt": "intervmerge",
}


@contextmanager
def style() -> Iterator[None]:
    """The figures' look, for the time of a block."""
    with mpl.rc_context(_RC):
        yield


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> Any:
    """A figure of ``width`` x ``height`` inches, and its axes, always (rows, columns)."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width, height), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def grid(panels: int, width: float, widest: int = 3) -> tuple[int, int, float]:
    """Columns and rows of panels, and the width they need."""
    columns = 1 if width < WIDE else min(panels, widest)
    return columns, math.ceil(panels / columns), _BROAD if columns > 2 else width


def keep_panels(axes: Any, number: int) -> list[Axes]:
    """The first of them; the others are taken out of the figure."""
    for spare in axes.flat[number:]:
        spare.remove()
    return list(axes.flat[:number])


def axis_names(figure: Figure, panels: Sequence[Axes], x: str, y: str) -> None:
    """Once for all panels."""
    if len(panels) == 1:
        panels[0].set_xlabel(x)
        panels[0].set_ylabel(y)
    else:
        figure.supxlabel(x, fontsize=8.5, color=MUTED)
        figure.supylabel(y, fontsize=8.5, color=MUTED)


def place_legend(figure: Figure, handles: Sequence[Line2D], width: float, gap: float = 0.2) -> None:
    """Above the panels, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(width * 72 / (4.6 * longest + 32))))
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns, frameon=False,
                  handletextpad=gap, columnspacing=1.4, borderpad=0.1)  # fmt: skip


class Colours:
    """A colour and a marker for every method: a hue a family, a tint a rank within it.

    Args:
        methods: all methods' names, in the order of the table.
    """

    def __init__(self, methods: Sequence[str]):
        families: dict[str, list[str]] = {}
        for method in methods:
            families.setdefault(_family(method), []).append(method)
        self._place = {}
        for hue, members in enumerate(families.values()):
            ranked = sorted(members, key=lambda m: -(_rank(m) or 0))
            for tint, method in enumerate(ranked):
                self._place[method] = (hue % len(_FAMILIES), min(tint, len(_TINTS) - 1))

    def colour(self, method: str) -> str:
        """Its hex colour."""
        return _tinted(*self._place[method])

    def marker(self, method: str) -> str:
        """Its matplotlib marker."""
        return _FAMILY_MARKERS[self._place[method][0]]

    def families(self) -> list[list[str]]:
        """The methods, those of one family together, in the order of rank."""
        found: dict[str, list[str]] = {}
        for method in self._place:
            found.setdefault(_family(method), []).append(method)
        return [sorted(members, key=lambda m: _rank(m) or 0) for members in found.values()]


def css_variables(dark: bool) -> dict[str, str]:
    """The figures' colours as CSS custom properties, for light or dark."""
    hues = _FAMILIES_IN_THE_DARK if dark else _FAMILIES
    return {f"--hue-{i}": hue for i, hue in enumerate(hues)}


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, sharp enough for a slide."""
    return _print(figure, "png", dpi=220)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG file on a white ground."""
    return _print(figure, "svg", metadata={"Date": None}).decode()


def to_inline_svg(figure: Figure, name: str, alternative: str) -> str:
    """The figure as an ``<svg>`` element whose colours are the page's.

    Args:
        name: prefix of its ids, unique in the page.
        alternative: what it shows, in words.
    """
    figure.patch.set_alpha(0)
    svg = to_svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for hex_colour, variable in _variables().items():
        svg = svg.replace(hex_colour, variable)
    # drawn as wide as the page allows, up to a size at which its text is as large as the page's
    size = f'style="max-width: {round(118 * figure.get_figwidth())}px"'
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    label = html.escape(alternative, quote=True)
    return f'{head} role="img" aria-label="{label}" {size}>{rest}'


def parameter_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis of parameter counts, with a few round ticks around the values."""
    low, high = min(values), max(values)
    margin = max(0.25 * np.log10(high / low), 0.35)
    left, right = np.log10(low) - margin, np.log10(high) + margin
    axes.set_xscale("log")
    axes.set_xlim(10**left, 10**right)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in range(int(left) - 1, int(right) + 2) for s in steps]
        ticks = [t for t in ticks if 10**left <= t <= 10**right]
        if len(ticks) <= 6:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: count(v).replace(".0", "")))


def label_points(
    axes: Axes, points: np.ndarray, texts: Sequence[str], obstacles: Sequence[Bbox] = ()
) -> list[Annotation]:
    """Write a label beside each point, clear of points, obstacles and each other.

    The first line of a label is its name, in bold; a second line is muted. Candidates lie on
    rings around the point, near ones first; labels are moved in turn until none finds better.

    Args:
        axes: with its final limits and position.
        points: (points, 2), in data coordinates.
        texts: one a point.
        obstacles: boxes in pixels that should stay free.

    Returns:
        What was added, to measure.
    """
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixel = axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    anchors = axes.transData.transform(points)
    fixed = [_box_around(anchor, 6 * pixel) for anchor in anchors] + list(obstacles)
    corners = np.array([box.extents for box in fixed])
    notes, options = [], []
    for point, text in zip(points, texts, strict=True):
        name, _, rest = text.partition("\n")
        made = [_note(axes, point, name, INK, "bold")]
        made += [_note(axes, point, rest, MUTED, "normal")] if rest else []
        boxes = [m.get_window_extent(renderer) for m in made]
        width, height = max(b.width for b in boxes), sum(b.height for b in boxes)
        notes.append(made)
        options.append(_candidates(width, height, pixel))
    places = [_Place(a, o[0], pixel) for a, o in zip(anchors, options, strict=True)]
    for _ in range(4):
        for i, anchor in enumerate(anchors):
            others = [place for j, place in enumerate(places) if j != i]
            tried = [_Place(anchor, option, pixel) for option in options[i]]
            costs = [p.cost(others, corners, frame) + 0.3 * k for k, p in enumerate(tried)]
            places[i] = tried[int(np.argmin(costs))]
    for point, made, place in zip(points, notes, places, strict=True):
        left, bottom, width, height = (v / pixel for v in place.offset)
        align: Any = "left" if left > 0 else "right" if left + width < 0 else "center"
        x = {"left": left, "right": left + width, "center": left + width / 2}[align]
        for row, note in enumerate(made):
            note.set_horizontalalignment(align)
            note.set_position((x, bottom + height * (len(made) - row - 1) / len(made)))
        if place.leader:
            axes.annotate(
                "", point, xytext=tuple(place.near / pixel), textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkA": 1,
                            "shrinkB": 5},
            )  # fmt: skip
    return list(itertools.chain.from_iterable(notes))


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write labels at the right edge at the given heights, pushed apart where they would touch.

    Args:
        axes: with its final limits and position, and room at its right.
        ends: (height in data coordinates, text, colour).
    """
    pixel = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    order = sorted(range(len(ends)), key=lambda i: ends[i][0])
    wanted = [axes.transData.transform((0, ends[i][0]))[1] / pixel for i in order]
    low, high = frame.y0 / pixel + 3, frame.y1 / pixel - 1
    step = min(11.0, (high - low) / max(len(ends) - 1, 1))
    for place, i, at in zip(_spread(wanted, step, low, high), order, wanted, strict=True):
        _, text, colour = ends[i]
        axes.annotate(
            text, (1, 0), xycoords="axes fraction", xytext=(9, place - frame.y0 / pixel),
            textcoords="offset points", va="center", color=INK, annotation_clip=False,
            fontsize=7.5,
        )  # fmt: skip
        axes.annotate(
            "", (1, (at - frame.y0 / pixel) / (frame.height / pixel)), xycoords="axes fraction",
            xytext=(8, place - at), textcoords="offset points", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1, "shrinkA": 0, "shrinkB": 1},
        )  # fmt: skip


def freeze(figure: Figure) -> None:
    """Settle the layout, so that labels can be placed in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _print(figure: Figure, kind: str, **kwargs: Any) -> bytes:
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format=kind, **kwargs)
    return stream.getvalue()


def _family(method: str) -> str:
    name, _, folder = method.partition("@")
    return family_and_rank(family_and_budget(name)[0])[0] + folder


def _rank(method: str) -> int | None:
    """What tells the members of a family apart: a rank, or a budget."""
    name = method.partition("@")[0]
    return family_and_budget(name)[1] or family_and_rank(name)[1]


def _tinted(hue: int, tint: int) -> str:
    colour = np.array([int(_FAMILIES[hue][i : i + 2], 16) for i in (1, 3, 5)])
    mixed = np.rint(_TINTS[tint] * colour + (1 - _TINTS[tint]) * 255).astype(int)
    return "#" + "".join(f"{v:02x}" for v in mixed)


def _variables() -> dict[str, str]:
    """Hex colour -> what the page writes in its place."""
    found = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
    found[SURFACE] = "var(--surface)"
    for hue, (tint, share) in itertools.product(range(len(_FAMILIES)), enumerate(_TINTS)):
        plain = f"var(--hue-{hue})"
        mixed = f"color-mix(in srgb, {plain} {share:.0%}, var(--surface))"
        found[_tinted(hue, tint)] = plain if tint == 0 else mixed
    return found


def _note(axes: Axes, point: Any, text: str, colour: str, weight: str) -> Annotation:
    note = axes.annotate(
        text, point, xytext=(0, 0), textcoords="offset points", color=colour, weight=weight,
        fontsize=8 if weight == "bold" else 7.5, bbox=PLATE, zorder=6 + (weight == "bold"),
        annotation_clip=False,
    )  # fmt: skip
    note.set_in_layout(False)
    return note


def _candidates(width: float, height: float, pixel: float) -> list[tuple[float, ...]]:
    """(left, bottom, width, height) in pixels from the point, the best first."""
    found: list[tuple[float, ...]] = []
    for ring in (8, 12, 17, 24, 33, 44, 58):
        r = ring * pixel
        d = 0.75 * r
        left, right, middle = -r - width, r, -width / 2
        corners = ((d, -d - height), (-d - width, d), (d, d), (-d - width, -d - height))
        wings = ((-d, r), (d - width, r), (-d, -r - height), (d - width, -r - height))
        sides = ((right, -height / 2), (left, -height / 2), (middle, r), (middle, -r - height))
        found += [(x, y, width, height) for x, y in (*sides, *corners, *wings)]
    return found


class _Place:
    """Where a label may go: its box, and the line to its point where that is far."""

    def __init__(self, anchor: np.ndarray, offset: tuple[float, ...], pixel: float):
        left, bottom, width, height = self.offset = offset
        self.box = Bbox.from_bounds(anchor[0] + left, anchor[1] + bottom, width, height)
        self.near = np.array([np.clip(0, left, left + width), np.clip(0, bottom, bottom + height)])
        self.leader: list[Bbox] = []
        if np.hypot(*self.near) > 14 * pixel:
            steps = np.linspace(0.2, 0.9, 8)
            self.leader = [_box_around(anchor + t * self.near, 1.5 * pixel) for t in steps]

    def cost(self, others: Sequence[_Place], fixed: np.ndarray, frame: Bbox) -> float:
        """How much of the box is outside or covers something, and whether lines cross labels."""
        outside = 1 - _covered(self.box, frame)
        grown = self.box.padded(2)
        cost = 300 * outside + 60 * _covered_all(fixed, grown)
        for other in others:
            cost += 120 * _covered(grown, other.box)
            cost += 60 * sum(_covered(line, grown) for line in other.leader)
            cost += 60 * sum(_covered(line, other.box) for line in self.leader)
        return cost


def _covered(a: Bbox, b: Bbox) -> float:
    """The share of ``a`` that lies in ``b``."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height / (a.width * a.height) if width > 0 and height > 0 else 0.0


def _covered_all(corners: np.ndarray, b: Bbox) -> float:
    """The sum of ``_covered`` over boxes, (boxes, x0 y0 x1 y1)."""
    low, high = corners[:, :2], corners[:, 2:]
    common = np.clip(np.minimum(high, b.max) - np.maximum(low, b.min), 0, None)
    return float((common.prod(1) / (high - low).prod(1)).sum())


def _box_around(centre: np.ndarray, half: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - half, centre[1] - half, 2 * half, 2 * half)


def _spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Heights in the same order, at least ``step`` apart, as near to the wanted as can be."""
    blocks: list[list[float]] = []  # [sum of (wanted - own offset), members]
    for i, at in enumerate(wanted):
        blocks.append([at - i * step, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    flat = [total / members for total, members in blocks for _ in range(int(members))]
    top = high - (len(wanted) - 1) * step
    return [min(max(base, low), max(top, low)) + i * step for i, base in enumerate(flat)]
