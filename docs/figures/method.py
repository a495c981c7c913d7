"""Draws the pictures of docs/method.md: ``python docs/figures/method.py``.

What they show of placement (tokens, blocks, parts) and of parameter counts is asked of the code.
Each file is a plain SVG on a white ground; a browser that prefers a dark page swaps the colours.
``--png FOLDER`` writes PNGs as well, light and dark, for slides and to look at.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from fusion_bench_intervmerge.interventions.config import PartSettings
from fusion_bench_intervmerge.interventions.functions import build_function
from fusion_bench_intervmerge.interventions.placement import (
    resolve_blocks,
    resolve_part,
    resolve_tokens,
)

HERE = Path(__file__).parent
WIDTH, BLOCKS, SIDE = 768, 12, 7  # ViT-B/32: 7 x 7 patches and the class token

INK, MUTED, LINE, SURFACE, FROZEN = "#1c2127", "#5c6670", "#c3cad1", "#ffffff", "#eef1f4"
# Okabe and Ito's hues, and a pale one of each
HUES = ("#0072b2", "#d55e00", "#009e73")
PALE = ("#d5e8f4", "#fbe2d3", "#d3ede4")
DARK = {
    INK: "#e4e8ec",
    MUTED: "#a3adb7",
    LINE: "#4a545e",
    SURFACE: "#14181d",
    FROZEN: "#262d35",
    HUES[0]: "#4db2f0",
    HUES[1]: "#ff8b4a",
    HUES[2]: "#33c79c",
    PALE[0]: "#123a54",
    PALE[1]: "#56301a",
    PALE[2]: "#114437",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "mathtext.fontset": "stix",
    "svg.fonttype": "path",
    "svg.hashsalt": "intervmerge",
}

FIGURES: dict[str, Callable[[], Figure]] = {}


def figure(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    FIGURES[draw.__name__] = draw
    return draw


# -- the pictures ----------------------------------------------------------------------------------


@figure
def sites() -> Figure:
    """One block of the encoder and what follows the last: where an edit can act."""
    sheet, axes = canvas(11.8, 3.35)
    y = 1.75
    axes.add_patch(rounded(0.7, 0.78, 7.6, 2.4, LINE, SURFACE, radius=0.12, style="--"))
    label(axes, 0.9, 2.92, "block b of the merged encoder, frozen", MUTED, ha="left", size=9)
    for x, text, width in (
        (1.6, "layer\nnorm", 0.78),
        (2.85, "self-\nattention", 1.05),
        (5.3, "layer\nnorm", 0.78),
        (6.32, "MLP", 0.72),
        (9.75, "layer norm,\nprojection", 1.15),
    ):
        box(axes, x, y, width, 0.78, text)
    sums = (4.45, 7.5)
    for x in sums:
        axes.add_patch(Circle((x, y), 0.14, ec=INK, fc=SURFACE, lw=1.3, zorder=3))
        label(axes, x, y - 0.005, "+", size=11, zorder=4)
    path = [0.25, 1.21, 1.99, 2.32, 3.38, 4.31, 4.59, 4.91, 5.69, 5.96, 6.68, 7.36, 7.64, 9.17]
    for start, end in zip(path[::2], path[1::2], strict=True):
        arrow(axes, (start, y), (end, y))
    arrow(axes, (10.33, y), (11.55, y))
    label(axes, 0.42, y + 0.2, "$h_b$", size=13)
    label(axes, 8.72, y + 0.22, "$h_{b+1}$", size=13)
    label(axes, 8.74, y - 0.2, "after the\nlast block", MUTED, size=7.5, va="top")
    label(axes, 11.4, y + 0.36, "image\nfeatures", size=9)
    for start, end in ((0.98, sums[0]), (4.72, sums[1])):
        bow(axes, start, end, y, 0.68)
        label(axes, (start + end) / 2, y + 0.8, "residual", MUTED, size=8)

    for x, name, used, strong in (
        (3.85, "attention", "IntervMerge", True),
        (6.98, "mlp", "", False),
        (7.98, "block", "closed form,\nSurgeryV2", False),
        (10.82, "output", "Surgery, SurgeryV2", False),
    ):
        pill(axes, x, y, strong)
        axes.plot([x, x], [y - 0.2, 0.66], color=HUES[0], lw=1, zorder=1)
        label(axes, x, 0.44, name, HUES[0], weight="bold", size=11, va="baseline")
        label(axes, x, 0.34, used, MUTED, size=8.5, va="top")
    return sheet


@figure
def functions() -> Figure:
    """The forms of an edit: what is read of z, what is added to it, how many numbers it takes."""
    sheet, axes = canvas(11.4, 5.45)
    forms = [
        ("noreft", r"$z + W_2^{\top}(W_1 z + b - W_2 z)$", ["W_1", "-W_2"], "W_2", True),
        ("loreft", r"$z + R^{\!\top}(W_1 z + b - R\,z)$", ["W_1", "-R"], "R", True),
        ("direft", r"$z + R^{\!\top}(W_1 z + b)$", ["W_1"], "R", True),
        ("nodireft", r"$z + W_2^{\top}(W_1 z + b)$", ["W_1"], "W_2", True),
        ("consreft", r"$z + R^{\!\top}(b - R\,z)$", ["-R"], "R", True),
        ("lobireft", r"$z + R^{\!\top} b$", [], "R", True),
        ("surgery", r"$z - \mathrm{up}\;\mathrm{relu}(\mathrm{down}\;z)$", ["down"], "up", False),
    ]
    for place, (name, formula, reads, writes, bias) in enumerate(forms):
        left, top = 0.15 + 2.82 * (place % 4), 5.1 - 2.72 * (place // 4)
        label(axes, left + 0.02, top, name, weight="bold", ha="left", va="baseline", size=11)
        label(axes, left + 0.02, top - 0.33, formula, ha="left", va="baseline", size=13)
        middle = top - 1.28
        edit_form(axes, left, middle, reads, writes, bias)
        function = build_function(name, WIDTH, 1)
        trained = sum(p.numel() for p in function.parameters())
        folded = sum(p.numel() for p in function.folded().parameters())
        words = f"{trained:,} numbers at k = {WIDTH}, r = 1"
        if folded != trained:
            words += f"\n{folded:,} when folded"
        label(axes, left + 0.02, top - 1.96, words, MUTED, ha="left", size=8, va="top")
    left, top = 0.15 + 2.82 * 3, 5.1 - 2.72
    for row, (hue, text) in enumerate(
        (
            (0, "a free matrix, r x k"),
            (1, "R: r x k, its rows orthonormal"),
            (2, "b: r numbers"),
        )
    ):
        y = top - 0.15 - 0.36 * row
        axes.add_patch(Rectangle((left + 0.02, y - 0.09), 0.26, 0.18, fc=PALE[hue], ec=HUES[hue]))
        label(axes, left + 0.4, y, text, ha="left", size=9)
    words = (
        "Left: down from k entries to r. Right: back\nup to k. The straight line is z itself.\n"
        "A minus subtracts what was read."
    )
    label(axes, left + 0.02, top - 1.28, words, MUTED, ha="left", va="top", size=8.5)
    return sheet


@figure
def placement() -> Figure:
    """Which tokens, which blocks, which part of the width, as the code places them."""
    sheet, axes = canvas(11.4, 5.0)
    head(axes, 0.15, 4.72, "tokens", "positions of ViT-B/32: the class token and 7 x 7 patches")
    names = ("class", "first", "middle", "last", "patch", "all")
    for place, name in enumerate(names):
        left, top = 0.2 + 1.2 * (place % 3), 3.72 - 1.85 * (place // 3)
        tokens = token_positions(resolve_tokens(name, SIDE**2 + 1))
        step = 0.125
        cell(axes, left, top, step, 0 in tokens)
        for position in range(1, SIDE**2 + 1):
            row, column = divmod(position - 1, SIDE)
            x, y = left + column * step, top - (row + 1.6) * step
            cell(axes, x, y, step, position in tokens)
        label(axes, left, top + 0.27, name, ha="left", va="baseline", size=9.5, weight="bold")

    left = 4.15
    head(axes, left, 4.72, "blocks", "of 12, numbered from 0")
    patterns = ("all", "every_2", "every_3", "first_3", "middle_1", "last_3", [0, 4, 8])
    for row, pattern in enumerate(patterns):
        y = 3.86 - 0.52 * row
        chosen = resolve_blocks(pattern, BLOCKS)
        label(axes, left, y + 0.1, str(pattern), ha="left", size=9.5, weight="bold")
        for block in range(BLOCKS):
            cell(axes, left + 0.95 + 0.175 * block, y, 0.175, block in chosen, height=0.2)

    left = 8.1
    head(axes, left, 4.72, "part", "of the width, 768 entries")
    scale = 2.45 / WIDTH

    def bar(y: float, part: slice) -> None:
        x, wide = left + 0.72, (part.stop - part.start) * scale
        axes.add_patch(Rectangle((x, y), WIDTH * scale, 0.15, fc=FROZEN, ec=LINE, lw=0.6))
        axes.add_patch(Rectangle((x + part.start * scale, y), wide, 0.15, fc=HUES[0], ec="none"))

    for block in range(BLOCKS):
        y = 3.78 - 0.19 * block
        bar(y, resolve_part(PartSettings(size=64, shift=True), WIDTH, block))
        if block in (0, 1, BLOCKS - 1):
            label(axes, left + 0.66, y + 0.07, f"block {block}", MUTED, ha="right", size=7.5)
    label(axes, left, 4.13, "{size: 64, shift: true}", ha="left", size=9.5, weight="bold")
    y = 0.72
    label(axes, left, y + 0.42, "[64, 320]", ha="left", size=9.5, weight="bold")
    bar(y, resolve_part([64, 320], WIDTH, 0))
    label(axes, left + 0.66, y + 0.07, "every block", MUTED, ha="right", size=7.5)
    label(axes, left, 0.4, "The rest of the vector stays as it is.", MUTED, ha="left", size=8.5)
    return sheet


@figure
def distillation() -> Figure:
    """Training: the repaired encoder's features move to the expert's, without labels."""
    sheet, axes = canvas(11.4, 4.3)
    upper, lower = 3.2, 1.3
    stack(axes, 0.75, (upper + lower) / 2)
    label(axes, 0.85, 1.3, "unlabelled images\nof task t", MUTED, size=8.5, va="top")
    arrow(axes, (1.5, 2.45), (2.35, upper))
    arrow(axes, (1.5, 2.05), (2.35, lower))
    box(axes, 4.75, upper, 4.7, 0.85, "")
    label(axes, 4.75, upper, "expert t, frozen", size=10.5)
    encoder(axes, 2.4, lower, 4.7, 0.95, [HUES[0]])
    label(axes, 4.75, lower + 0.66, "merged encoder, frozen, with edits of task t", size=10.5)
    for y, hue, text in ((upper, INK, "expert's"), (lower, HUES[0], "repaired")):
        arrow(axes, (7.15, y), (7.75, y))
        bars(axes, 7.85, y, hue)
        label(axes, 8.12, y + 0.62, f"{text}\nimage features", MUTED, size=8.5)
    axes.add_patch(rounded(8.75, 1.92, 1.75, 0.66, INK, SURFACE, radius=0.1))
    label(axes, 9.62, 2.25, "mean L1", size=10.5, weight="bold")
    arrow(axes, (8.45, upper), (9.6, 2.62), curve=-0.3)
    arrow(axes, (8.45, lower), (9.6, 1.88), curve=0.3)
    dashes = {"color": HUES[1], "lw": 1.6, "linestyle": (0, (4, 2.5)), "zorder": 2}
    axes.plot([9.95, 9.95, 4.75], [1.88, 0.45, 0.45], **dashes)
    arrow(axes, (4.75, 0.42), (4.75, 0.79), colour=HUES[1], width=1.6)
    words = "gradient: only the edits move (and, if asked, the coefficients)"
    label(axes, 4.9, 0.2, words, HUES[1], size=9, ha="left")
    return sheet


@figure
def solving() -> Figure:
    """Solved, not trained: block by block the repaired encoder is brought back to the expert."""
    sheet, axes = canvas(11.9, 3.55)
    top, bottom, step = 2.75, 0.95, 2.6
    stack(axes, 0.75, (top + bottom) / 2)
    label(axes, 0.8, 0.82, "unlabelled\nimages", MUTED, size=9, va="top")
    for y, text, curve in ((top, "the expert", -0.2), (bottom, "the merged encoder", 0.2)):
        arrow(axes, (1.35, (top + bottom) / 2 + 0.1 * (y - 1.85)), (2.2, y), curve=curve)
        label(axes, 2.28, y + (0.52 if y == top else -0.52), text, MUTED, ha="left", size=9)
    for place in range(3):
        x = 2.65 + step * place
        name = f"block {place}" if place < 2 else "block $b$"
        for y in (top, bottom):
            box(axes, x, y, 0.95, 0.62, name)
            arrow(axes, (x + 0.49, y), (x + 1.05, y))
        z = x + 1.2
        label(axes, z, top, "$t$", size=14)
        label(axes, z, bottom, "$z$", size=14)
        last = place == 2
        axes.annotate(
            "", (z, top - 0.2), (z, bottom + 0.2),
            arrowprops={"arrowstyle": "<->", "color": HUES[1], "lw": 1.4},
        )  # fmt: skip
        text = "1  fit $t - z$ to $z$" if place == 0 else "fit"
        label(axes, z - 0.08, 1.85, text, HUES[1], size=9, ha="right")
        pill(axes, z + 0.45, bottom, strong=True)
        arrow(axes, (z + 0.12, bottom), (z + 0.28, bottom))
        if place == 0:
            label(axes, z + 0.45, bottom - 0.42, "2  apply", HUES[0], size=9)
            label(axes, z + 1.2, bottom - 0.42, "3  go on", MUTED, size=9)
        if not last:
            arrow(axes, (z + 0.15, top), (x + step - 0.49, top))
            arrow(axes, (z + 0.63, bottom), (x + step - 0.5, bottom))
    arrow(axes, (z + 0.15, top), (z + 1.3, top))
    arrow(axes, (z + 0.63, bottom), (z + 1.3, bottom))
    label(axes, z + 1.75, top, "expert's\nfeatures", size=9)
    label(axes, z + 1.75, bottom, "repaired\nfeatures", size=9)
    return sheet


@figure
def calibration() -> Figure:
    """Other weights: one map for all tasks brings each task's stream to its expert's."""
    sheet, axes = canvas(11.4, 4.1)
    stack(axes, 0.75, 2.1)
    label(axes, 0.8, 1.5, "unlabelled\nimages", MUTED, size=9, va="top")
    begin, end = 2.0, 8.35
    for task, hue in enumerate(HUES):
        y = 3.6 - 0.52 * task
        arrow(axes, (1.35, 2.25 + 0.05 * (1 - task)), (begin, y), curve=-0.2)
        axes.plot([begin, end], [y, y], color=hue, lw=1.5, zorder=1)
        axes.add_patch(rounded(4.95, y - 0.19, 1.9, 0.38, hue, PALE[task], radius=0.08, zorder=3))
        label(axes, 5.9, y, f"expert {task + 1}'s own map", size=8.5, zorder=4)
        label(axes, end + 0.3, y, f"$E_{task + 1}$", hue, size=13)
    y, below = 1.35, 0.5
    arrow(axes, (1.35, 2.0), (begin, y), curve=0.2)
    words = "the encoder that is being calibrated, all images of all tasks"
    label(axes, begin + 0.02, y + 0.42, words, MUTED, ha="left", size=9)
    axes.plot([begin, 7.26], [y, y], color=INK, lw=1.3, zorder=1)
    label(axes, 2.35, y + 0.18, "$S$", size=13)
    axes.plot([2.75, 2.75, 3.0], [y, below, below], color=INK, lw=1.3, zorder=1)
    arrow(axes, (2.9, below), (3.24, below))
    box(axes, 4.0, below, 1.5, 0.56, "attention,\nor MLP")
    arrow(axes, (4.76, below), (5.6, below))
    label(axes, 5.16, below + 0.19, "$H$", size=13)
    axes.add_patch(rounded(5.65, below - 0.25, 1.2, 0.5, INK, INK, radius=0.1, zorder=3))
    label(axes, 6.25, below, "$W,\\ b$", SURFACE, size=13, zorder=4)
    axes.plot([6.86, 7.4], [below, below], color=INK, lw=1.3, zorder=1)
    arrow(axes, (7.4, below), (7.4, y - 0.14))
    axes.add_patch(Circle((7.4, y), 0.14, ec=INK, fc=SURFACE, lw=1.3, zorder=3))
    label(axes, 7.4, y - 0.005, "+", size=11, zorder=4)
    arrow(axes, (7.54, y), (end + 0.02, y))
    axes.annotate(
        "", (end + 0.3, 2.36), (end + 0.3, y + 0.05),
        arrowprops={"arrowstyle": "<->", "color": INK, "lw": 1.4},
    )  # fmt: skip
    words = "solve for one map\nthat serves all tasks"
    label(axes, end + 0.55, 1.85, words, ha="left", size=9)
    label(
        axes,
        end + 0.55,
        0.75,
        "then the next map,\nbehind the new weights",
        MUTED,
        ha="left",
        size=9,
    )
    return sheet


@figure
def mixed_batch() -> Figure:
    """Inference: images of several tasks in one forward pass, each edited for its own task."""
    sheet, axes = canvas(10.9, 4.2)
    tasks = ("mnist", "svhn", "cars")
    batch = (0, 1, 0, 2, 1)
    left, right, top, step = 2.5, 8.8, 3.32, 0.6
    axes.add_patch(rounded(left, 0.55, right - left, 3.2, LINE, FROZEN, radius=0.14))
    words = "one merged encoder, one forward pass: each image meets its own task's edits"
    label(axes, (left + right) / 2, 3.97, words, size=10)
    for block in range(5):
        x = left + 0.85 + 1.16 * block
        axes.add_patch(rounded(x - 0.38, 0.68, 0.76, 2.94, LINE, SURFACE, radius=0.08))
        text = ("block 0", "block 1", "block 2", "...", "block 11")[block]
        label(axes, x, 0.33, text, MUTED, size=8)
    for row, task in enumerate(batch):
        y = top - step * row
        hue = HUES[task]
        axes.add_patch(Rectangle((1.42, y - 0.21), 0.42, 0.42, fc=PALE[task], ec=hue, lw=1.3))
        label(axes, 1.3, y, tasks[task], hue, ha="right", size=10, weight="bold")
        axes.plot([1.9, right + 0.35], [y, y], color=hue, lw=1.5, zorder=2)
        for block in range(5):
            x = left + 0.85 + 1.16 * block
            axes.add_patch(
                rounded(x - 0.24, y - 0.15, 0.48, 0.3, hue, PALE[task], radius=0.1, zorder=3)
            )
        arrow(axes, (right + 0.3, y), (right + 0.6, y), colour=hue)
        bars(axes, right + 0.7, y, hue, small=True)
    label(axes, 1.63, 3.97, "images", MUTED, size=9)
    label(axes, right + 1.0, 3.97, "image features", MUTED, size=9)
    words = "each as if it had been\nencoded by itself"
    label(axes, right + 1.0, 0.33, words, MUTED, size=8)
    return sheet


# -- what they are made of -------------------------------------------------------------------------


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A sheet whose coordinates are inches."""
    sheet = Figure(figsize=(width, height), dpi=100, facecolor=SURFACE)
    FigureCanvasAgg(sheet)
    axes = sheet.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return sheet, axes


def label(axes: Axes, x: float, y: float, text: str, colour: str = INK, **kwargs) -> None:
    settings = {"ha": "center", "va": "center", "zorder": 6, "color": colour} | kwargs
    settings["fontsize"] = settings.pop("size", 10)
    axes.text(x, y, text, linespacing=1.3, **settings)


def head(axes: Axes, x: float, y: float, title: str, rest: str) -> None:
    label(axes, x, y, title, HUES[0], ha="left", va="baseline", size=12, weight="bold")
    label(axes, x, y - 0.24, rest, MUTED, ha="left", va="baseline", size=8.5)


def rounded(
    x: float, y: float, width: float, height: float, edge: str, face: str,
    radius: float = 0.08, style: str = "-", zorder: float = 1,
) -> FancyBboxPatch:  # fmt: skip
    return FancyBboxPatch(
        (x + radius, y + radius), width - 2 * radius, height - 2 * radius,
        boxstyle=f"round,pad={radius}", ec=edge, fc=face, lw=1.2, linestyle=style, zorder=zorder,
    )  # fmt: skip


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    axes.add_patch(rounded(x - width / 2, y - height / 2, width, height, LINE, FROZEN, zorder=3))
    label(axes, x, y, text, size=9.5)


def arrow(
    axes: Axes, start: tuple, end: tuple, colour: str = INK, curve: float = 0.0, width: float = 1.3
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=10, color=colour, lw=width, shrinkA=0,
            shrinkB=0, connectionstyle=f"arc3,rad={curve}", zorder=2,
        )
    )  # fmt: skip


def bow(axes: Axes, start: float, end: float, y: float, height: float) -> None:
    """A residual connection above the path."""
    axes.plot([start, start, end], [y, y + height, y + height], color=INK, lw=1.3, zorder=1)
    arrow(axes, (end, y + height), (end, y + 0.15))
    axes.add_patch(Circle((start, y), 0.035, color=INK, zorder=4))


def pill(axes: Axes, x: float, y: float, strong: bool) -> None:
    """An edit."""
    face = HUES[0] if strong else PALE[0]
    axes.add_patch(rounded(x - 0.17, y - 0.2, 0.34, 0.4, HUES[0], face, radius=0.12, zorder=5))
    label(axes, x, y, r"$\Phi$", SURFACE if strong else HUES[0], size=12)


def edit_form(
    axes: Axes, left: float, middle: float, reads: list[str], writes: str, bias: bool
) -> None:
    """One form of edit as a drawing: z on the left, z' on the right, k entries tall."""
    tall, thin = 1.16, 0.16
    z, end = left + 0.16, left + 2.45
    for x in (z, end):
        axes.add_patch(Rectangle((x - 0.06, middle - tall / 2), 0.12, tall, fc=FROZEN, ec=INK))
    for x, text in ((z, "z"), (end, "z\u2032")):
        look = {"family": "DejaVu Serif", "style": "italic", "va": "baseline", "size": 10.5}
        label(axes, x, middle + tall / 2 + 0.07, text, **look)
    level = middle - 0.1
    heights = {0: [], 1: [level], 2: [level + 0.22, level - 0.24]}[len(reads)]
    spread = {1: 0.56, 2: 0.4}.get(len(reads), 0.0)
    sum_at = left + 1.28
    for name, y in zip(reads, heights, strict=True):
        hue = 1 if "R" in name else 0
        x0, x1 = z + 0.16, z + 0.66
        corners = [(x0, y - spread / 2), (x0, y + spread / 2), (x1, y + thin / 2)]
        corners.append((x1, y - thin / 2))
        axes.add_patch(Polygon(corners, fc=PALE[hue], ec=HUES[hue], zorder=3))
        plain = name.lstrip("-")
        shown = plain if plain in ("down", "up") else f"${plain}$"
        label(axes, (x0 + x1) / 2 - 0.02, y, shown, HUES[hue], size=8 if plain == "down" else 10)
        arrow(
            axes,
            (x1 + 0.02, y),
            (sum_at - (0.11 if bias else 0.26), level + 0.35 * (y - level)),
            width=1,
        )
        if name.startswith("-"):
            label(axes, x1 + 0.2, y + (0.17 if y < level else 0.13), "\u2212", size=12)
    if bias:
        axes.add_patch(Circle((sum_at, level), 0.11, fc=PALE[2], ec=HUES[2], lw=1.3, zorder=4))
        label(axes, sum_at, level, "$b$", HUES[2], size=10)
    else:
        box(axes, sum_at - 0.04, level, 0.42, 0.26, "")
        label(axes, sum_at - 0.04, level, "relu", size=8)
    hue = 1 if writes == "R" else 0
    x0, x1 = sum_at + 0.3, sum_at + 0.8
    corners = [(x0, level - thin / 2), (x0, level + thin / 2), (x1, level + 0.28)]
    corners.append((x1, level - 0.28))
    axes.add_patch(Polygon(corners, fc=PALE[hue], ec=HUES[hue], zorder=3))
    shown = writes if writes == "up" else rf"${writes}^{{\top}}$"
    label(axes, (x0 + x1) / 2 + 0.05, level, shown, HUES[hue], size=8.5 if writes == "up" else 10)
    arrow(axes, (sum_at + (0.12 if bias else 0.18), level), (x0 - 0.01, level), width=1)
    arrow(axes, (x1 + 0.02, level), (end - 0.08, level), width=1)
    label(axes, x1 + 0.13, level + 0.12, "+" if bias else "\u2212", size=11)
    straight = middle + 0.48
    arrow(axes, (z + 0.08, straight), (end - 0.08, straight), width=1)


def cell(
    axes: Axes, x: float, y: float, size: float, chosen: bool, height: float | None = None
) -> None:
    face = HUES[0] if chosen else FROZEN
    axes.add_patch(Rectangle((x, y), size, height or size, fc=face, ec=LINE, lw=0.7))


def token_positions(index) -> set[int]:
    if isinstance(index, slice):
        return set(range(index.start, index.stop))
    return set(index.tolist())


def encoder(
    axes: Axes, left: float, y: float, width: float, height: float, hues: list[str]
) -> None:
    """A frozen encoder whose blocks carry an edit each."""
    axes.add_patch(rounded(left, y - height / 2, width, height, LINE, FROZEN, radius=0.1))
    step = (width - 0.3) / 6
    for block in range(6):
        x = left + 0.15 + step * (block + 0.5)
        axes.add_patch(rounded(x - 0.31, y - 0.36, 0.62, 0.72, LINE, SURFACE, zorder=2))
        for place, hue in enumerate(hues):
            pale = PALE[HUES.index(hue)]
            axes.add_patch(
                rounded(x - 0.18, y - 0.17 + 0.2 * place, 0.36, 0.34, hue, pale, 0.1, zorder=3)
            )
            label(axes, x, y + 0.2 * place, r"$\Phi$", hue, size=11)


def stack(axes: Axes, x: float, y: float) -> None:
    """A pile of images."""
    for offset in (0.2, 0.1, 0.0):
        axes.add_patch(
            Rectangle((x - 0.45 + offset, y - 0.45 + offset), 0.9, 0.9, fc=SURFACE, ec=INK, lw=1.2)
        )
    hill = [(x - 0.45, y - 0.45), (x - 0.15, y + 0.1), (x + 0.05, y - 0.15), (x + 0.2, y + 0.02)]
    axes.add_patch(Polygon([*hill, (x + 0.45, y - 0.45)], fc=FROZEN, ec=INK, lw=1))
    axes.add_patch(Circle((x + 0.2, y + 0.24), 0.09, fc=FROZEN, ec=INK, lw=1))


def bars(axes: Axes, x: float, y: float, colour: str, small: bool = False) -> None:
    """A feature vector."""
    heights = np.array([0.55, 0.9, 0.35, 0.75, 0.5, 0.95, 0.4]) * (0.38 if small else 0.7)
    for place, height in enumerate(heights):
        left = x + 0.085 * place
        axes.add_patch(Rectangle((left, y - height / 2), 0.055, height, fc=colour, ec="none"))


# -- files -----------------------------------------------------------------------------------------


def to_svg(sheet: Figure, title: str) -> str:
    """The figure as an SVG file; CSS swaps its colours where the reader prefers a dark page."""
    stream = io.StringIO()
    sheet.savefig(stream, format="svg", metadata={"Date": None, "Title": title})
    svg = stream.getvalue()
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    start = svg.index("<defs>")
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>\n "
    svg = svg[:start] + style + svg[start:]
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def in_the_dark(sheet: Figure) -> Figure:
    for artist in sheet.findobj():
        for kind in ("color", "facecolor", "edgecolor"):
            colour = getattr(artist, f"get_{kind}", lambda: None)()
            if mpl.colors.is_color_like(colour) and mpl.colors.to_hex(colour) in DARK:
                getattr(artist, f"set_{kind}")(DARK[mpl.colors.to_hex(colour)])
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, help="folder for PNGs, light and dark")
    options = parser.parse_args()
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            (HERE / f"{name}.svg").write_text(to_svg(draw(), draw.__doc__.strip()))
            if options.png is not None:
                options.png.mkdir(parents=True, exist_ok=True)
                draw().savefig(options.png / f"{name}.png", dpi=150)
                in_the_dark(draw()).savefig(options.png / f"{name}-dark.png", dpi=150)


if __name__ == "__main__":
    main()
