"""Image features in the plane: Figure 4 of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import EXPERT, TaskEncoders

IMAGES = 100  # t-SNE's cost grows with all encoders' points


def pca(points: np.ndarray) -> np.ndarray:
    """The two directions of largest variance, (points, k) -> (points, 2)."""
    from sklearn.decomposition import PCA  # slow to import, and needed here alone

    return PCA(n_components=2, svd_solver="full").fit_transform(points)


def tsne(points: np.ndarray) -> np.ndarray:
    """t-SNE from the principal components, with a fixed seed, (points, k) -> (points, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)


def measure(encoders: TaskEncoders) -> dict[str, dict[str, Any]]:
    """One plane for all encoders of a task, fitted to all their image features together.

    Returns:
        Encoder, the expert among them -> ``pca`` and ``tsne``: [x, y] of the first ``IMAGES``
        images, the same ones for all encoders.
    """
    names = [EXPERT, *encoders.compared]
    features = [encoders.trace(name).features[:IMAGES].double().numpy() for name in names]
    planes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for kind, embed in (("pca", pca), ("tsne", tsne)):
        clouds = np.split(embed(np.concatenate(features)), len(names))
        for name, cloud in zip(names, clouds, strict=True):
            planes[name][kind] = cloud.round(4).tolist()
    return planes
