"""The figures of a merge's analyses. Encoders are drawn in their methods' colours, merged grey.

Each settles its layout before it is handed over, since a report writes it several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .analysis import Analysis, Tasks, in_all, over_tasks
from .drawing import (
    GRID,
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
    place_legend,
    style,
)
from .words import readable

MERGED, EXPERT = "merged", "expert"
IMAGES_SHOWN = 60
_SITES = {"attention": "o", "mlp": "s", "block": "D", "output": "*"}


@dataclass(frozen=True)
class Drawing:
    """A figure of analyses.

    Attributes:
        name: of its file, and its anchor in a page.
        title: its heading.
        text: what it shows.
        draw: makes it, for a width in inches.
    """

    name: str
    title: str
    text: str
    draw: Callable[[float], Figure]


def drawings(found: Analysis) -> Iterator[Drawing]:
    """The figures of what was analysed, in the order of a report.

    Args:
        found: analysis -> task -> encoder -> value, of one merge.
    """
    if "bias" in found:
        agreement = found.get("agreement")
        if agreement is not None and list(agreement) != list(found["bias"]):
            agreement = None  # of some tasks no class names are known
        yield Drawing(
            "closeness",
            "How close to the experts",
            "The mean absolute difference of image features to the expert's"
            + (", and how often the predicted class is the expert's." if agreement else "."),
            partial(closeness, found["bias"], agreement),
        )
        yield Drawing(
            "bias_by_block",
            "Bias along the blocks",
            "The mean absolute difference of the class token to the expert's after each block.",
            partial(bias_by_block, found["bias"]),
        )
    if "stitching" in found:
        share = _best_share(found["stitching"])
        what = "Accuracy" if share == "accuracy" else "Agreement with the expert's predictions"
        yield Drawing(
            "stitching",
            "Stitching",
            f"{what} of a network whose first blocks are the model's and whose others are the "
            "expert's, by the number of blocks from the model. At 0 it is the expert, at the right "
            "end the model with its own readout.",
            partial(stitching, found["stitching"]),
        )
    if "contributions" in found:
        yield Drawing(
            "contributions",
            "What each edit contributes",
            "The change when the edit of one block is switched off and all others stay: mean over "
            "tasks, thin bars from the lowest task to the highest. An edit helps where the "
            "distance grows, and where agreement and accuracy fall.",
            partial(contributions, found["contributions"]),
        )
    if "embeddings" in found:
        for kind, name in (("pca", "PCA"), ("tsne", "t-SNE")):
            yield Drawing(
                f"embeddings_{kind}",
                f"Image features in the plane, by {name}",
                f"A row a task; one plane in each row, fitted by {name} to all encoders together. "
                "The small points are the expert's, and a line joins those of the same image; "
                f"{IMAGES_SHOWN} images at most.",
                partial(embeddings, found["embeddings"], kind),
            )


def closeness(bias: Tasks, agreement: Tasks | None, width: float = WIDE) -> Figure:
    """Each task's distance of image features, and agreement of predictions."""
    kinds: list[tuple[str, Tasks, Callable[[Any], float]]] = [
        ("distance of image features", bias, lambda value: value["features"])
    ]
    if agreement:
        title = "predictions equal to the expert's"
        kinds.append((title, agreement, lambda share: 100 * share))
    names = list(next(iter(bias.values())))
    looks = _Looks(names)
    columns, lines, width = grid(len(kinds), width, widest=2)
    labels = [*map(readable, bias), "mean"]
    y = np.arange(len(labels)) + 0.35 * (np.arange(len(labels)) == len(bias))
    per_row = max(0.27, 0.075 * len(names))
    with style():
        height = (per_row * len(labels) + 0.6) * lines + 0.35
        figure, axes = canvas(width, height, lines, columns)
        for i, ((title, tasks, read), panel) in enumerate(
            zip(kinds, keep_panels(axes, len(kinds)), strict=True)
        ):
            values = {name: _with_mean(over_tasks(tasks, name, read)) for name in names}
            every = np.array(list(values.values()))
            panel.hlines(y, every.min(0), every.max(0), color=GRID, lw=2.5, zorder=1)
            for name, own in values.items():
                panel.plot(own, y, ls="", **looks.marker(name), zorder=2 + (name != MERGED))
            panel.axhline(y[-1] - 0.68, color=GRID, lw=0.8)
            panel.set_yticks(y, labels if i % columns == 0 else [""] * len(labels))
            panel.get_yticklabels()[-1].set_fontweight("bold")
            panel.tick_params(axis="y", labelcolor=INK)
            panel.tick_params(axis="x", length=0)
            panel.set_ylim(y[-1] + 0.6, -0.6)
            panel.set_title(title, fontsize=8.5, weight="normal")
            panel.grid(axis="y", visible=False)
            panel.grid(axis="x", visible=True)
            panel.spines["bottom"].set_visible(False)
            if tasks is agreement:
                panel.xaxis.set_major_formatter(PERCENT)
        place_legend(figure, [looks.handle(name) for name in names], width)
        freeze(figure)
    return figure


def bias_by_block(found: Tasks, width: float = WIDE) -> Figure:
    """Each encoder's bias along the blocks: the mean over tasks, and every task."""
    return _along(found, lambda value: value["blocks"], 1, "block", "distance to the expert", width)


def stitching(found: Tasks, width: float = WIDE) -> Figure:
    """The stitched networks' accuracy (or agreement) by cut: the mean, and every task."""
    share = _best_share(found)
    return _along(
        found, lambda value: 100 * np.array(value[share]), 0, "blocks from the model", share, width
    )


def contributions(found: Tasks, width: float = WIDE) -> Figure:
    """The change that each edit's absence makes, a panel a quantity."""
    names = list(next(iter(found.values())))
    edits = next(iter(found.values()))
    kinds = [
        (key, title, scale)
        for key, title, scale in (
            ("bias", "distance to the expert", 1),
            ("agreement", "agreement, points", 100),
            ("accuracy", "accuracy, points", 100),
        )
        if key in in_all([e for tasks in found.values() for own in tasks.values() for e in own])
    ]
    blocks = 1 + max((e["block"] for own in edits.values() for e in own if e["block"] is not None),
                     default=-1)  # fmt: skip
    last = blocks + 1  # where the edits of the image features stand
    looks = _Looks([MERGED, *names])
    curves = [(name, site) for name in names for site in dict.fromkeys(
        edit["site"] for edit in edits[name])]  # fmt: skip
    columns, lines, width = grid(len(kinds), width)
    with style():
        figure, axes = canvas(width, 2.5 * lines + 0.5, lines, columns)
        for (key, title, scale), panel in zip(kinds, keep_panels(axes, len(kinds)), strict=True):
            panel.axhline(0, color=MUTED, lw=0.8)
            for i, (name, site) in enumerate(curves):
                own = [edit for edit in edits[name] if edit["site"] == site]
                x = np.array([last if e["block"] is None else e["block"] + 1 for e in own])
                x = x + 0.12 * (i - (len(curves) - 1) / 2)
                values = scale * over_tasks(found, name, partial(_of_site, site, key))
                colour = looks.colour(name)
                panel.vlines(x, values.min(0), values.max(0), color=colour, lw=1, alpha=0.45)
                panel.plot(x, values.mean(0), **looks.site(name, site), zorder=3)
            panel.set_title(title, fontsize=8.5, weight="normal")
            step = max(1, round(blocks / 8))
            ticks = {block: str(block) for block in range(1, blocks + 1, step)}
            if any(site == "output" for _, site in curves):
                ticks[last] = "output"
            panel.set_xticks(list(ticks), list(ticks.values()))
        axis_names(figure, figure.axes, "edit switched off, by block", "change")
        handles = []
        for name, site in curves:
            several = sum(other == name for other, _ in curves) > 1
            label = f"{readable(name)}, {site}" if several else readable(name)
            handles.append(Line2D([], [], **looks.site(name, site), label=label))
        place_legend(figure, handles, width - 0.6, gap=0.6)
        freeze(figure)
    return figure


def embeddings(found: Tasks, kind: str, width: float = WIDE) -> Figure:
    """Image features in the plane: a row a task, a column an encoder, the expert in each.

    All tiles are one pair of axes: dozens of axes would take their time to lay out, and these have
    no scales to show.
    """
    names = [name for name in next(iter(found.values())) if name != EXPERT]
    shown = _one_a_family(names, 4 if width >= WIDE else 3)
    looks = _Looks(names)
    high = 0.72  # of a tile, whose width is 1
    size = 1.0 if width >= WIDE else 0.65
    with style():
        side = (width - 0.2) / len(shown)
        figure, axes = canvas(width, side * high * len(found) + 0.45)
        panel = axes[0, 0]
        panel.set_axis_off()
        panel.set(xlim=(0, len(shown)), ylim=(-high * len(found), 0), aspect="equal")
        for row, (task, encoders) in enumerate(found.items()):
            clouds = {n: np.array(encoders[n][kind][:IMAGES_SHOWN], float)
                      for n in (*shown, EXPERT)}  # fmt: skip
            every = np.concatenate(list(clouds.values()))
            low, top = every.min(0), every.max(0)
            scale = min(np.array([0.9, 0.8 * high]) / np.maximum(top - low, 1e-9))
            for column, name in enumerate(shown):
                centre = np.array([column + 0.5, -high * (row + 0.54)])
                own, expert = (
                    centre + scale * (clouds[n] - (low + top) / 2) for n in (name, EXPERT)
                )
                frame = ((column + 0.02, -high * (row + 1) + 0.02), 0.96, high - 0.04)
                panel.add_patch(Rectangle(*frame, fill=False, ec=GRID, lw=0.8))
                _strokes(panel, own, expert, looks.colour(name), 0.6 * size, alpha=0.45)
                _strokes(panel, expert, expert, INK, 2.6 * size)
                _strokes(panel, own, own, looks.colour(name), 3.6 * size)
            panel.text(0.05, -high * row - 0.05, readable(task), va="top",
                       fontsize=8 if width >= WIDE else 7, bbox=PLATE, zorder=4)  # fmt: skip
        for column, name in enumerate(shown):
            panel.text(column + 0.5, 0.02, readable(name), ha="center", va="bottom", weight="bold",
                       fontsize=8.5 if width >= WIDE else 7.5)  # fmt: skip
        freeze(figure)
    return figure


# -- parts -----------------------------------------------------------------------------------------


class _Looks:
    """Every encoder's colour and marker: merged is a grey ring, the others are as their methods."""

    def __init__(self, names: Sequence[str]):
        others = [name for name in names if name != MERGED]
        self._colours = Colours(sorted(others, key=lambda n: not n.startswith("intervmerge")))

    def colour(self, name: str) -> str:
        return MUTED if name == MERGED else self._colours.colour(name)

    def marker(self, name: str) -> dict[str, Any]:
        if name == MERGED:
            return {"marker": "o", "mfc": SURFACE, "mec": MUTED, "mew": 1.3, "ms": 5.5}
        shape, colour = self._colours.marker(name), self.colour(name)
        return {"marker": shape, "color": colour, "mec": SURFACE, "mew": 0.6, "ms": 5.8}

    def line(self, name: str) -> dict[str, Any]:
        found = {"color": self.colour(name), "marker": "o", "ms": 2.8, "lw": 1.4}
        # over the others: a repair of the image features leaves every block as it was
        return found | ({"ls": (0, (2, 1.5)), "zorder": 3} if name == MERGED else {})

    def site(self, name: str, site: str) -> dict[str, Any]:
        size = 10 if site == "output" else 5
        shape = {"marker": _SITES[site], "ms": size, "mec": SURFACE, "mew": 0.5}
        return {"color": self.colour(name), "lw": 1.3, **shape}

    def handle(self, name: str) -> Line2D:
        return Line2D([], [], ls="", label=readable(name), **self.marker(name))


def _along(
    found: Tasks, read: Callable[[Any], Any], first: int, xlabel: str, ylabel: str, width: float
) -> Figure:
    """Every encoder's curve, a panel a task after one of the mean; x counts from ``first``."""
    names = list(next(iter(found.values())))
    looks = _Looks(names)
    curves = {name: over_tasks(found, name, read) for name in names}
    titles = ["mean over tasks", *map(readable, found)] if len(found) > 1 else [""]
    columns = min(len(titles), 3 if width >= WIDE else 2)
    lines = math.ceil(len(titles) / columns)
    with style():
        high = 1.55 * lines + 0.65 if len(titles) > 1 else 3.2
        figure, axes = canvas(width, high, lines, columns, sharex=True, sharey=True)
        for i, (title, panel) in enumerate(
            zip(titles, keep_panels(axes, len(titles)), strict=True)
        ):
            for name, values in curves.items():
                curve = values.mean(0) if i == 0 else values[i - 1]
                x = np.arange(first, first + len(curve))
                panel.plot(x, curve, **looks.line(name))
            panel.set_title(title, fontsize=8.5, weight="bold" if i == 0 else "normal")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.tick_params(labelbottom=True)
            if ylabel in ("accuracy", "agreement"):
                panel.yaxis.set_major_formatter(PERCENT)
        if ylabel not in ("accuracy", "agreement"):
            figure.axes[0].set_ylim(bottom=0)  # of all: once every curve is there
        axis_names(figure, figure.axes, xlabel, ylabel)
        handles = [Line2D([], [], **looks.line(name), label=readable(name)) for name in names]
        place_legend(figure, handles, width - 0.6, gap=0.6)
        freeze(figure)
    return figure


def _of_site(site: str, key: str, edits: Sequence[dict[str, Any]]) -> list[float]:
    return [edit[key] for edit in edits if edit["site"] == site]


def _best_share(found: Tasks) -> str:
    """Accuracy where there were labels, agreement where there were none."""
    values = [value for encoders in found.values() for value in encoders.values()]
    return "accuracy" if "accuracy" in in_all(values) else "agreement"


def _one_a_family(names: Sequence[str], number: int) -> list[str]:
    """Merged, and of each family of methods the one of the largest rank."""
    families = Colours([name for name in names if name != MERGED]).families()
    chosen = {MERGED, *(family[-1] for family in families)}
    return [name for name in names if name in chosen][:number]


def _strokes(
    panel: Axes, starts: np.ndarray, ends: np.ndarray, colour: str, size: float, alpha: float = 1
) -> None:
    """Lines between points (points, 2), or round points where both are the same, as one path.

    A mark of its own for every point would make a page of many tasks several times as large.
    """
    gap = np.full_like(starts, np.nan)
    path = np.stack([starts, ends + 1e-5, gap], axis=1).reshape(-1, 2)
    (line,) = panel.plot(*path.T, color=colour, lw=size, alpha=alpha, solid_capstyle="round")
    line.set_snap(False)
    line.get_path().should_simplify = False


def _with_mean(values: np.ndarray) -> np.ndarray:
    return np.append(values, values.mean())
