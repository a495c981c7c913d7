"""Image features in the plane: Figure 4 of the paper."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .subject import EXPERT, Subject

# As many as a picture can show joined by lines; t-SNE's cost grows with all encoders' points.
IMAGES = 100


def pca(points: np.ndarray) -> np.ndarray:
    """The two directions of largest variance, (points, k) -> (points, 2)."""
    return PCA(n_components=2, svd_solver="full").fit_transform(points)


def tsne(points: np.ndarray) -> np.ndarray:
    """t-SNE from the principal components, with a fixed seed, (points, k) -> (points, 2)."""
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)


def measure(subject: Subject) -> dict[str, dict[str, list[list[float]]]]:
    """One plane for all encoders of a task, fitted to all their image features together.

    Returns:
        Encoder, the expert among them -> ``pca`` and ``tsne``: [x, y] of the first ``IMAGES``
        images. The points of all encoders follow the same images, so that one can be joined to
        the expert's.
    """
    names = [EXPERT, *subject.compared]
    features = [subject.trace(name).features[:IMAGES].double().numpy() for name in names]
    found: dict[str, dict[str, list[list[float]]]] = {name: {} for name in names}
    for kind, embed in (("pca", pca), ("tsne", tsne)):
        clouds = np.split(embed(np.concatenate(features)), len(names))
        for name, cloud in zip(names, clouds, strict=True):
            found[name][kind] = cloud.round(4).tolist()
    return found
