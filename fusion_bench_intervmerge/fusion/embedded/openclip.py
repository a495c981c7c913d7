"""The embedded pool in OpenCLIP's form: the same encoders, images and zero-shot heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.models.open_clip import ClassificationHead
from omegaconf import OmegaConf
from transformers import CLIPVisionModel

from fusion_bench_intervmerge.encoders.convert import to_openclip
from fusion_bench_intervmerge.encoders.huggingface import HuggingFaceTower

from ..openclip import ImageEncoder, OpenCLIPVisionModelPool
from ..screen import one_line
from .build import ensure_pool
from .pool import PoolSettings, check_keys, load_clip, load_dataset, load_processor
from .tasks import SPLITS, TASKS


class EmbeddedOpenCLIPVisionModelPool(OpenCLIPVisionModelPool):
    """A tiny OpenCLIP encoder with eight experts, their heads and datasets; built offline.

    Args:
        seed: which pool; another seed draws, pre-trains and fine-tunes anew.
        models: further models by name, such as ``_merged_``.
    """

    @one_line
    def __init__(self, seed: int = 0, models: Mapping[str, Any] | None = None, **kwargs: Any):
        check_keys(kwargs, type(self))
        seed = PoolSettings.read({"seed": seed}, "modelpool").seed
        own: Any = {name: _target(load_encoder, name=name, seed=seed) for name in _folders()}
        heads = {name: _target(load_head, task=name, seed=seed) for name in TASKS}
        datasets = {
            f"{key}_datasets": OmegaConf.create(
                {name: _target(load_dataset, task=name, split=split, seed=seed) for name in TASKS}
            )
            for key, split in zip(("train", "val", "test"), SPLITS, strict=True)
        }
        super().__init__(
            own | dict(models or {}),
            classification_heads=OmegaConf.create(heads),
            **datasets,
            **kwargs,
        )


def load_encoder(name: str, seed: int = 0) -> ImageEncoder:
    """An encoder of the embedded pool: ``_pretrained_`` or a task's expert."""
    vision = CLIPVisionModel.from_pretrained(ensure_pool(seed) / _folders()[name])
    tower = HuggingFaceTower(vision, load_clip(seed).visual_projection)
    processor: Any = load_processor(seed)
    images = processor.image_processor
    return ImageEncoder(to_openclip(tower, images.image_mean, images.image_std))


def load_head(task: str, seed: int = 0) -> ClassificationHead:
    """A task's zero-shot head in the task-vectors paper's form: with the logit scale in it."""
    classifier: Any = HFCLIPClassifier(load_clip(seed), load_processor(seed))
    classifier.set_classification_task(list(TASKS[task].classnames), TASKS[task].templates)
    scale = classifier.clip_model.logit_scale.detach().exp()
    return ClassificationHead(normalize=True, weights=scale * classifier.zeroshot_weights)


def _folders() -> dict[str, str]:
    return {"_pretrained_": "pretrained", **{name: f"experts/{name}" for name in TASKS}}


def _target(function: Any, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{function.__module__}.{function.__qualname__}", **arguments}
