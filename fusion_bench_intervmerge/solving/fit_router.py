"""A router for a model: fitted on unlabelled images of each task, or read from its files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import ConfigError, named
from ..data import Datasets, DataSettings, choose_images, read_images
from ..model.model import InterventionModel
from ..model.router import Reading, Router, RouterSettings

BATCH = 64


@torch.no_grad()
def fit_router(
    model: InterventionModel,
    images: Datasets,
    settings: RouterSettings | Mapping[str, object] | str | None = None,
    *,
    seed: int = 0,
    num_workers: int = 0,
) -> Router:
    """Give a model a router, or add tasks to the one that it has.

    Nothing is trained and no label is read; an image costs less than a forward pass.

    Args:
        model: the model; it keeps the router as ``model.router``.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        settings: as the method's config file says them, or a router's name. None: if the model has
            a router, these tasks are added to it, and the others stay to the bit; if it has none,
            the defaults.
        seed: which images of a dataset are taken, the same ones as for edits of that seed.
        num_workers: processes that decode images.

    Returns:
        The router.

    Raises:
        ConfigError: a setting that does not fit, a task without two images, or none of the model's.
        ValueError: a task that the model does not have.
    """
    with named("router"):
        router = model.router if settings is None else None
        chosen = RouterSettings.read({} if settings is None else settings)
        chosen = chosen if router is None else router.settings
        if not images:
            raise ConfigError("", "there are no images", "images of one task or more")
        rows: dict[str, Tensor] = {}
        for task, data in images.items():
            model.edits_of(task)
            available = len(data)
            if available < 2:
                raise ConfigError("images", f"task {task!r} has {available}", "2 or more")
            indices = choose_images(task, available, DataSettings(images=chosen.images), seed)
            keys = [(task, index) for index in indices]
            batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
            read = read_images({task: data}, batches, num_workers)
            rows[task] = torch.cat([model.router_rows(batch.to(model.device)) for batch in read])
        if router is None:
            router = Router(Reading.fit(torch.cat(list(rows.values())), chosen.dims), chosen)
        for task, own in rows.items():
            router.add(task, own)
    model.router = router
    return router
