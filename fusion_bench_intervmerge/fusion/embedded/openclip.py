"""The embedded pool in OpenCLIP's form: the same encoders, images and zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.models.open_clip import ClassificationHead
from omegaconf import OmegaConf
from transformers import CLIPVisionModel

from ...encoders.convert import to_openclip
from ...encoders.huggingface import HuggingFaceTower
from ...tinyclip.build import ensure_pool
from ...tinyclip.pools import TINY, Pool
from ..openclip.encoder import ImageEncoder
from ..openclip.pool import OpenCLIPVisionModelPool
from ..screen import one_line
from .pool import PoolSettings, check_keys, datasets, folders, load_clip, load_processor, target


class EmbeddedOpenCLIPVisionModelPool(OpenCLIPVisionModelPool):
    """A small OpenCLIP encoder with eight experts, their heads and datasets; made ready offline.

    Args:
        seed: which pool; another seed draws, pre-trains and fine-tunes anew.
        models: further models by name, such as ``_merged_``.
        pool: its name, one of those in ``tinyclip/pools.py``.
    """

    @one_line
    def __init__(
        self,
        seed: int = 0,
        models: Mapping[str, object] | None = None,
        pool: str = TINY.name,
        **kwargs: object,
    ):
        check_keys(kwargs, type(self))
        settings = PoolSettings.read({"seed": seed, "pool": pool}, "modelpool")
        of = {"seed": settings.seed, "pool": settings.pool}
        tasks = Pool.named(settings.pool).tasks
        own = {name: target(load_encoder, name=name, **of) for name in folders(tasks)}
        heads = OmegaConf.create({name: target(load_head, task=name, **of) for name in tasks})
        own_data = datasets(tasks, **of)
        super().__init__(
            {**own, **(models or {})}, classification_heads=heads, **own_data, **kwargs
        )


def load_encoder(name: str, seed: int = 0, pool: str = TINY.name) -> ImageEncoder:
    """An encoder of an embedded pool: ``_pretrained_`` or a task's expert."""
    folder = folders(Pool.named(pool).tasks)[name]
    vision = CLIPVisionModel.from_pretrained(ensure_pool(seed, pool) / folder)
    tower = HuggingFaceTower(vision, load_clip(seed, pool).visual_projection)
    processor: object = load_processor(seed, pool)
    images = processor.image_processor
    return ImageEncoder(to_openclip(tower, images.image_mean, images.image_std))


def load_head(task: str, seed: int = 0, pool: str = TINY.name) -> ClassificationHead:
    """A task's zero-shot head in the task-vectors paper's form: with the logit scale in it."""
    classifier: object = HFCLIPClassifier(load_clip(seed, pool), load_processor(seed, pool))
    info = Pool.named(pool).tasks[task]
    classifier.set_classification_task(list(info.classnames), info.templates)
    scale = classifier.clip_model.logit_scale.detach().exp()
    return ClassificationHead(normalize=True, weights=scale * classifier.zeroshot_weights)
