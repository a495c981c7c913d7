"""The figures of every analysed merge: ``analysis.json`` drawn.

A function of ``FIGURES`` takes analysis -> task -> encoder -> value. Any analysis that none of them
draws is drawn as it is if its values are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...config import Json
from ..formatting import readable
from ..runs import ANALYSIS, LAYOUT, Evaluation, wrong_layout
from ..style import GREY, INK, WIDTH, Palette, Picture, blank, curves, dots, finish, name_axes

Analysed: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]

_AGREEMENT = "predictions equal to the expert's"
_MARKERS = {"attention": "o", "mlp": "s", "block": "D", "output": "*"}
_CHANGES = {  # of contributions: title, and what it is multiplied by
    "bias": ("distance to the expert", 1),
    "agreement": ("agreement, points", 100),
    "accuracy": ("accuracy, points", 100),
}
_SHOWN = 60  # images of a plane


def draw(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """Of every merge in turn; its name and its run's are told if there are several."""
    shown = [
        (number, run, merge)
        for number, run in enumerate(of.runs)
        for merge in run.analysis
        if merge in of.bases or not run.reports
    ]
    several = len({merge for _, _, merge in shown}) > 1
    for number, run, merge in shown:
        suffix, words = (f"-{merge}", [readable(merge)]) if several else ("", [])
        if len(of.runs) > 1:
            suffix, words = f"{suffix}-{number}", [*words, run.name]
        title = f" ({', '.join(words)})" if words else ""
        try:
            for one in draw_merge(run.analysis[merge], palette):
                name = re.sub(r"[^\w-]", "_", one.name + suffix)
                yield replace(one, name=name, title=one.title + title)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise wrong_layout(run.folder / ANALYSIS, error, LAYOUT) from error


def draw_merge(analysed: Analysed, palette: Palette) -> Iterator[Picture]:
    """The figures of what was analysed of a merge."""
    for analysis, figures in FIGURES:
        if analysis in analysed:
            yield from figures(analysed, palette)
    for name in analysed:
        if name not in DRAWN:
            yield from _numbers(name, pd.DataFrame(analysed[name]).T, palette)


def _numbers(name: str, values: pd.DataFrame, palette: Palette) -> Iterator[Picture]:
    """A value per task and encoder."""
    if all(isinstance(value, (int, float)) for value in values.to_numpy().flat):
        values = values.astype(float)
        values.loc["mean"] = values.mean()
        text = "A point per encoder, and the mean over tasks."
        yield Picture(name, readable(name), text, dots(palette, {"": values}))


def _closeness(analysed: Analysed, palette: Palette) -> Iterator[Picture]:
    """How close image features are, beside the predictions' agreement, and the class token."""
    tasks, agreement = analysed["bias"], analysed.get("agreement")
    features = {task: {e: v["features"] for e, v in of.items()} for task, of in tasks.items()}
    shown = {"distance of image features": pd.DataFrame(features).T}
    if agreement is not None and list(agreement) == list(tasks):  # else class names are missing
        shown[_AGREEMENT] = 100 * pd.DataFrame(agreement).T
    for values in shown.values():
        values.loc["mean"] = values.mean()
    blocks = {e: pd.DataFrame({t: of[e]["blocks"] for t, of in tasks.items()}) for e in values}
    blocks = {encoder: values.set_axis(values.index + 1) for encoder, values in blocks.items()}
    yield Picture(
        "closeness",
        "How close to the experts",
        "The mean absolute difference of image features to the expert's"
        + (", and how often the predicted class is the expert's." if len(shown) > 1 else "."),
        dots(palette, shown, percent=[_AGREEMENT]),
    )
    yield Picture(
        "bias_by_block",
        "Bias along the blocks",
        "The mean absolute difference of the class token to the expert's after each block.",
        curves(palette, blocks, "block", "distance to the expert"),
    )


def _stitching(analysed: Analysed, palette: Palette) -> Iterator[Picture]:
    """Accuracy by cut; agreement if some task had no labels."""
    tasks = analysed["stitching"]
    values = [value for of in tasks.values() for value in of.values()]
    share = "accuracy" if all("accuracy" in value for value in values) else "agreement"
    shown = {
        name: 100 * pd.DataFrame({task: of[name][share] for task, of in tasks.items()})
        for name in next(iter(tasks.values()))
    }
    what = {"accuracy": "Accuracy", "agreement": "Agreement with the expert's predictions"}[share]
    yield Picture(
        "stitching",
        "Stitching",
        f"{what} of a network whose first blocks are the model's and whose others are the "
        "expert's, by the number of blocks from the model. At 0 it is the expert, at the right "
        "end the model with its own readout.",
        curves(palette, shown, "blocks from the model", share),
    )


def _contributions(analysed: Analysed, palette: Palette) -> Iterator[Picture]:
    """The change that each edit's absence makes, one panel per quantity."""
    edits = pd.DataFrame(
        {"task": task, "model": model, **edit}
        for task, models in analysed["contributions"].items()
        for model, own in models.items()
        for edit in own
    ).set_index(["model", "site", "block"])
    if edits.groupby(level=[0, 1, 2], dropna=False).size().nunique() != 1:
        raise ValueError("contributions: the tasks' edits differ")
    kinds = [kind for kind in _CHANGES if kind in edits and edits[kind].notna().all()]
    yield Picture(
        "contributions",
        "What each edit contributes",
        "The change when the edit of one block is switched off and all others stay: mean over "
        "tasks, thin bars from the lowest task to the highest. An edit helps if the distance "
        "grows, and if agreement and accuracy fall.",
        _draw_contributions(edits[kinds], palette),
    )


def _draw_contributions(edits: pd.DataFrame, palette: Palette) -> Figure:
    changes = edits.groupby(level=[0, 1, 2], dropna=False, sort=False).agg(["mean", "min", "max"])
    groups = list(changes.groupby(level=[0, 1], sort=False))
    blocks = edits.index.get_level_values("block").max()
    last = 1 if pd.isna(blocks) else int(blocks) + 2  # the place of the edits of the output
    figure, axes = blank(edits.shape[1], 2.5, sharey=False)
    handles = []
    for i, ((model, site), of_site) in enumerate(groups):
        look, several = palette[model], sum(name == model for (name, _), _ in groups) > 1
        line: Json = {"color": look.colour, "marker": _MARKERS[site], "lw": 1.3, "mew": 0}
        line["ms"] = 10 if site == "output" else 5
        x = of_site.index.get_level_values("block").to_numpy(float) + 1
        x = pd.Series(x).fillna(last) + 0.12 * (i - (len(groups) - 1) / 2)
        for kind, panel in zip(edits, axes, strict=True):
            change = _CHANGES[kind][1] * of_site[kind]
            panel.vlines(x, change["min"], change["max"], color=look.colour, lw=1, alpha=0.45)
            panel.plot(x, change["mean"], **line, zorder=3)
        handles.append(look.handle(f"{look.label}, {site}" if several else "", **line))
    ticks = {block: str(block) for block in range(1, last, max(1, round((last - 1) / 6)))}
    if any(site == "output" for (_, site), _ in groups):
        ticks[last] = "output"
    for kind, panel in zip(edits, axes, strict=True):
        panel.axhline(0, color=GREY, lw=0.8, zorder=1)
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.set_title(_CHANGES[kind][0])
    name_axes(figure, "edit switched off, by block", "change")
    return finish(figure, handles, gap=0.6)


def _embeddings(analysed: Analysed, palette: Palette) -> Iterator[Picture]:
    """A picture per projection: one row per task, one column per encoder, the expert in each."""
    for kind, name in (("pca", "PCA"), ("tsne", "t-SNE")):
        tasks = {
            task: {encoder: _points(value[kind]) for encoder, value in of.items()}
            for task, of in analysed["embeddings"].items()
        }
        if any("expert" not in of for of in tasks.values()):
            raise ValueError("embeddings: the expert is missing")
        yield Picture(
            f"embeddings_{kind}",
            f"Image features in the plane, by {name}",
            f"A row per task; one plane in each row, fitted by {name} to all encoders together. "
            "The small points are the expert's, and a line joins those of the same image; "
            f"{_SHOWN} images at most.",
            _draw_planes(tasks, palette),
        )


def _points(value: list[list[float]]) -> np.ndarray:
    points = np.array(value[:_SHOWN], float)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("embeddings: a point has two coordinates")
    return points


def _draw_planes(tasks: Mapping[str, Mapping[str, np.ndarray]], palette: Palette) -> Figure:
    names = [name for name in next(iter(tasks.values())) if name != "expert"]
    # of each family of methods the largest
    largest = [family[-1] for family in palette.families(n for n in names if n != "merged")]
    names = [name for name in names if name in ("merged", *largest)][:4]
    high = 0.75 * WIDTH / len(names)
    figure = Figure((WIDTH, 0.3 + high * len(tasks)))
    figure.set_layout_engine("none")
    sides: Json = {"left": 0.03, "right": 0.99, "bottom": 0.01, "wspace": 0.04, "hspace": 0.04}
    axes = figure.subplots(
        len(tasks), len(names), squeeze=False, sharex="row", sharey="row",
        gridspec_kw={**sides, "top": 1 - 0.3 / figure.get_figheight()},
    )  # fmt: skip
    for (task, clouds), line in zip(tasks.items(), axes, strict=True):
        for name, panel in zip(names, line, strict=True):
            own, expert, colour = clouds[name], clouds["expert"], palette[name].colour
            _strokes(panel, own, expert, color=colour, lw=0.6, alpha=0.45)
            _strokes(panel, expert, expert, color=INK, lw=2.2)
            _strokes(panel, own, own, color=colour, lw=3.4)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set(visible=True, alpha=0.4)
        line[0].set_ylabel(readable(task), fontsize=8)
    for name, panel in zip(names, axes[0], strict=True):
        panel.set_title(palette[name].label)
    return figure


def _strokes(panel: Axes, starts: np.ndarray, ends: np.ndarray, **look: Any) -> None:
    """Lines between points (points, 2), or round points if both are the same, as one path.

    A mark of its own for every point would make a page of many tasks several times as large.
    """
    gap = np.full_like(starts, np.nan)
    path = np.stack([starts, ends + 1e-5, gap], axis=1).reshape(-1, 2)
    (line,) = panel.plot(*path.T, solid_capstyle="round", **look)
    line.set_snap(False)
    line.get_path().should_simplify = False


FIGURES: list[tuple[str, Callable[[Analysed, Palette], Iterator[Picture]]]] = [
    ("bias", _closeness),
    ("stitching", _stitching),
    ("contributions", _contributions),
    ("embeddings", _embeddings),
]
DRAWN = {"agreement", *(analysis for analysis, _ in FIGURES)}
