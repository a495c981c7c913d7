"""Image features in the plane: Figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Json
from . import EXPERT, Drawing, Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..report.style import Canvas
    from .base import TaskEncoders

PLACE = 40
# As many as a picture can show joined by lines; t-SNE's cost grows with all encoders' points.
IMAGES = 100
_SHOWN = 60
_HIGH = 0.72  # of a tile in the figure, whose width is 1


def pca(points: np.ndarray) -> np.ndarray:
    """The two directions of largest variance, (points, k) -> (points, 2)."""
    from sklearn.decomposition import PCA

    return PCA(n_components=2, svd_solver="full").fit_transform(points)


def tsne(points: np.ndarray) -> np.ndarray:
    """t-SNE from the principal components, with a fixed seed, (points, k) -> (points, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)


def measure(encoders: TaskEncoders) -> dict[str, dict[str, list[list[float]]]]:
    """One plane for all encoders of a task, fitted to all their image features together.

    Returns:
        Encoder, the expert among them -> ``pca`` and ``tsne``: [x, y] of the first ``IMAGES``
        images. The points of all encoders follow the same images, so that one can be joined to
        the expert's.
    """
    names = [EXPERT, *encoders.compared]
    features = [encoders.trace(name).features[:IMAGES].double().numpy() for name in names]
    found: dict[str, dict[str, list[list[float]]]] = {name: {} for name in names}
    for kind, embed in (("pca", pca), ("tsne", tsne)):
        clouds = np.split(embed(np.concatenate(features)), len(names))
        for name, cloud in zip(names, clouds, strict=True):
            found[name][kind] = cloud.round(4).tolist()
    return found


def figures(found: Found) -> Iterator[Drawing]:
    """A picture a projection: a row a task, a column an encoder, the expert in each."""
    for kind, name in (("pca", "PCA"), ("tsne", "t-SNE")):
        tasks = {
            task: {encoder: _points(value[kind]) for encoder, value in of.items()}
            for task, of in found["embeddings"].items()
        }
        if any(EXPERT not in of for of in tasks.values()):
            raise ValueError("embeddings: the expert is missing")
        yield (
            f"embeddings_{kind}",
            f"Image features in the plane, by {name}",
            f"A row a task; one plane in each row, fitted by {name} to all encoders together. "
            "The small points are the expert's, and a line joins those of the same image; "
            f"{_SHOWN} images at most.",
            partial(_draw, tasks),
        )


def _points(value: list[list[float]]) -> np.ndarray:
    points = np.array(value[:_SHOWN], float)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("embeddings: a point has two coordinates")
    return points


def _draw(tasks: Mapping[str, Mapping[str, np.ndarray]], canvas: Canvas) -> Figure:
    """All tiles are one pair of axes: dozens would take their time, and have no scales to show."""
    from matplotlib.patches import Rectangle

    palette, size = canvas.palette, 1.0 if canvas.wide else 0.65
    names = [name for name in next(iter(tasks.values())) if name != EXPERT]
    # of each family of methods the largest
    largest = [family[-1] for family in palette.families(names)]
    names = [name for name in names if name in largest][: 4 if canvas.wide else 3]
    side = (canvas.width - 0.2) / len(names)
    panels = canvas.panels(1, side * _HIGH * len(tasks) + 0.45)
    (panel,) = panels.axes
    panel.set_axis_off()
    panel.set(xlim=(0, len(names)), ylim=(-_HIGH * len(tasks), 0), aspect="equal")
    for row, (task, clouds) in enumerate(tasks.items()):
        every = np.concatenate([clouds[name] for name in (*names, EXPERT)])
        low, top = every.min(0), every.max(0)
        scale = min(np.array([0.9, 0.8 * _HIGH]) / np.maximum(top - low, 1e-9))
        for column, name in enumerate(names):
            centre = np.array([column + 0.5, -_HIGH * (row + 0.54)]) - scale * (low + top) / 2
            own, expert = centre + scale * clouds[name], centre + scale * clouds[EXPERT]
            corner = (column + 0.02, -_HIGH * (row + 1) + 0.02)
            frame = Rectangle(corner, 0.96, _HIGH - 0.04, fill=False, ec=canvas.GRID, lw=0.8)
            panel.add_patch(frame)
            _strokes(panel, own, expert, color=palette[name].colour, lw=0.6 * size, alpha=0.45)
            _strokes(panel, expert, expert, color=canvas.INK, lw=2.6 * size)
            _strokes(panel, own, own, color=palette[name].colour, lw=3.6 * size)
        look: Json = {"size": 7 + canvas.wide, "va": "top", "bbox": canvas.PLATE, "zorder": 4}
        panel.text(0.05, -_HIGH * row - 0.05, canvas.readable(task), **look)
    for column, name in enumerate(names):
        look = {"size": 7.5 + canvas.wide, "weight": "bold", "ha": "center", "va": "bottom"}
        panel.text(column + 0.5, 0.02, palette[name].label, **look)
    return panels.finish()


def _strokes(panel: Axes, starts: np.ndarray, ends: np.ndarray, **look: Any) -> None:
    """Lines between points (points, 2), or round points where both are the same, as one path.

    A mark of its own for every point would make a page of many tasks several times as large.
    """
    gap = np.full_like(starts, np.nan)
    path = np.stack([starts, ends + 1e-5, gap], axis=1).reshape(-1, 2)
    (line,) = panel.plot(*path.T, solid_capstyle="round", **look)
    line.set_snap(False)
    line.get_path().should_simplify = False
