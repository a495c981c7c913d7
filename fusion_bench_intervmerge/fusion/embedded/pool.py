"""The embedded pool as FusionBench sees it: a model pool, and the parts a task pool is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from omegaconf import OmegaConf
from PIL import Image
from pydantic import Field
from torch.utils.data import Dataset
from transformers import CLIPModel, CLIPProcessor

from fusion_bench_intervmerge.errors import ConfigError, unknown_key
from fusion_bench_intervmerge.settings import Seed, Settings

from ..screen import one_line
from .build import ensure_pool
from .tasks import SPLITS, TASKS


class PoolSettings(Settings):
    """The embedded pool's own settings."""

    seed: Seed = 0
    tasks: Annotated[
        list[str] | None, Field(description=f"null, or a list of {', '.join(TASKS)}")
    ] = None


class EmbeddedCLIPVisionModelPool(CLIPVisionModelPool):
    """A tiny CLIP with eight experts and their datasets; built at first use, offline.

    Args:
        seed: which pool; another seed draws, pre-trains and fine-tunes anew.
        tasks: which experts to take, by task; all where None.
        models: further models by name, such as ``_merged_``.
        kwargs: anything else of :class:`CLIPVisionModelPool`, in place of the pool's own.
    """

    _config_mapping = CLIPVisionModelPool._config_mapping | {"seed": "seed", "tasks": "tasks"}

    @one_line
    def __init__(
        self,
        seed: int = 0,
        tasks: Sequence[str] | None = None,
        models: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        check_keys(kwargs, type(self))
        settings = PoolSettings.read({"seed": seed, "tasks": tasks}, "modelpool")
        self.seed, self.tasks = settings.seed, settings.tasks or list(TASKS)
        for task in self.tasks:
            if task not in TASKS:
                raise unknown_key(task, TASKS, "task").under("modelpool.tasks")
        folder = ensure_pool(seed)
        own = {"_pretrained_": str(folder / "pretrained")}
        own |= {name: str(folder / "experts" / name) for name in self.tasks}
        datasets = {
            f"{key}_datasets": OmegaConf.create(
                {name: _dataset_config(name, split, seed) for name in self.tasks}
            )
            for key, split in zip(("train", "val", "test"), SPLITS, strict=True)
        }
        given = {"processor": own["_pretrained_"], **datasets, **kwargs}
        super().__init__({**own, **(models or {})}, **given)


def check_keys(given: Iterable[str], cls: type) -> None:
    """FusionBench's pools take any key, and leave the unknown ones where they are.

    Raises:
        ConfigError: a key that neither the class nor one it derives from has.
    """
    signatures = [inspect.signature(base.__init__) for base in cls.__mro__]  # type: ignore[misc]
    known = dict.fromkeys(name for s in signatures for name in s.parameters)
    for key in given:
        if key not in known:
            shown = [name for name in known if name not in ("self", "args", "kwargs")]
            raise unknown_key(key, shown).under("modelpool")


def _dataset_config(task: str, split: str, seed: int) -> dict[str, Any]:
    target = f"{load_dataset.__module__}.{load_dataset.__qualname__}"
    return {"_target_": target, "task": task, "split": split, "seed": seed}


class EmbeddedDataset(Dataset):
    """Images and labels in memory; an item is ``{"image": PIL.Image, "label": int}``.

    Args:
        images: uint8, (n, height, width, 3).
        labels: integers, (n,).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self.images[index]), "label": int(self.labels[index])}


def load_dataset(task: str, split: str, seed: int = 0) -> EmbeddedDataset:
    """A split of a task of the embedded pool.

    Raises:
        ConfigError: no such task or split.
    """
    if task not in TASKS:
        raise ConfigError("task", f"the embedded pool has no {task!r}", ", ".join(TASKS))
    if split not in SPLITS:
        raise ConfigError("split", f"the embedded pool has no {split!r}", ", ".join(SPLITS))
    with np.load(ensure_pool(seed) / "data" / f"{task}.npz") as data:
        return EmbeddedDataset(data[f"{split}_images"], data[f"{split}_labels"])


def load_clip(seed: int = 0) -> CLIPModel:
    """The embedded pool's pre-trained CLIP, both towers."""
    return CLIPModel.from_pretrained(_pretrained(seed))


def load_processor(seed: int = 0) -> CLIPProcessor:
    """The image processor and tokenizer of the embedded pool."""
    return CLIPProcessor.from_pretrained(_pretrained(seed))


def _pretrained(seed: int) -> Path:
    return ensure_pool(seed) / "pretrained"


def register_tasks() -> None:
    """Tells FusionBench the class names and captions of the embedded tasks."""
    for task in TASKS.values():
        info = {"classnames": list(task.classnames), "templates": task.templates}
        # ``dataset_info`` as well: without it FusionBench stores the templates under a wrong key.
        CLIPTemplateFactory.register_dataset(task.name, dataset_info=info, **info)
