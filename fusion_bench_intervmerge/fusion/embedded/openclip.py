"""The embedded pool in OpenCLIP's form: the same encoders, images and zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.models.open_clip.modeling import ClassificationHead
from omegaconf import OmegaConf
from transformers import CLIPVisionModel

from ...encoders.convert import to_openclip
from ...encoders.huggingface import HuggingFaceTower
from ...tinyclip.pools import TINY, Pool
from ..host import one_line
from ..openclip.checkpoints import ImageEncoder
from ..openclip.pools import OpenCLIPVisionModelPool
from .pool import (
    datasets,
    folders,
    load_clip,
    load_processor,
    pool_folder,
    read_settings,
    target,
)


class EmbeddedOpenCLIPVisionModelPool(OpenCLIPVisionModelPool):
    """A small OpenCLIP encoder with eight experts, their heads and datasets.

    Args:
        seed, tasks, models, pool, folder: as in ``EmbeddedCLIPVisionModelPool``.
    """

    @one_line
    def __init__(
        self,
        seed: int = 0,
        tasks: Sequence[str] | int | None = None,
        models: Mapping[str, object] | None = None,
        pool: str = TINY.name,
        folder: str | None = None,
        **kwargs: Any,
    ):
        given = {"seed": seed, "tasks": tasks, "pool": pool, "folder": folder}
        settings, chosen = read_settings(type(self), kwargs, given)
        place = {"pool": settings.pool, "folder": settings.folder}
        own = {name: target(load_encoder, name=name, **place) for name in folders(chosen)}
        heads = OmegaConf.create({name: target(load_head, task=name, **place) for name in chosen})
        data = datasets(chosen, **place)
        everything: Any = {**own, **(models or {})}
        super().__init__(everything, classification_heads=heads, **data, **kwargs)


def load_encoder(name: str, pool: str = TINY.name, folder: str | None = None) -> ImageEncoder:
    """An encoder of an embedded pool: ``_pretrained_`` or a task's expert."""
    at = folders(Pool.named(pool).tasks)[name]
    vision = CLIPVisionModel.from_pretrained(pool_folder(pool, folder) / at)
    tower = HuggingFaceTower(vision, load_clip(pool, folder).visual_projection)
    processor: Any = load_processor(pool, folder)
    images = processor.image_processor
    return ImageEncoder(to_openclip(tower, images.image_mean, images.image_std))


def load_head(task: str, pool: str = TINY.name, folder: str | None = None) -> ClassificationHead:
    """A task's zero-shot head in the task-vectors paper's form: with the logit scale in it."""
    classifier: Any = HFCLIPClassifier(load_clip(pool, folder), load_processor(pool, folder))
    info = Pool.named(pool).tasks[task]
    classifier.set_classification_task(list(info.classnames), info.templates)
    scale = classifier.clip_model.logit_scale.detach().exp()
    return ClassificationHead(normalize=True, weights=scale * classifier.zeroshot_weights)
