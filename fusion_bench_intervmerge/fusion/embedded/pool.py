"""The embedded pool as FusionBench sees it: a model pool, and the parts a task pool is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pydantic import Field
from torch.utils.data import Dataset
from transformers import CLIPModel, CLIPProcessor

from ...config import ConfigError, Seed, Settings, unknown_key
from ...tinyclip.build import ensure_pool
from ...tinyclip.pools import POOLS, TINY, Pool
from ...tinyclip.tasks import SPLITS
from ..screen import one_line
from .processor import processor_in


class PoolSettings(Settings):
    """An embedded pool's own settings."""

    seed: Seed = 0
    tasks: Annotated[list[str] | None, Field(description="null, or a list of the pool's tasks")] = (
        None
    )
    pool: Annotated[str, Field(description=f"one of {', '.join(POOLS)}")] = TINY.name


class EmbeddedCLIPVisionModelPool(CLIPVisionModelPool):
    """A small CLIP with eight experts and their datasets; made ready at first use, offline.

    Args:
        seed: which pool; another seed draws, pre-trains and fine-tunes anew.
        tasks: which experts to take, by task; all where None.
        pool: its name, one of those in ``tinyclip/pools.py``.
        models: further models by name, such as ``_merged_``.
        kwargs: anything else of :class:`CLIPVisionModelPool`, in place of the pool's own.
    """

    _config_mapping = CLIPVisionModelPool._config_mapping | {
        "seed": "seed",
        "tasks": "tasks",
        "pool": "pool",
    }

    @one_line
    def __init__(
        self,
        seed: int = 0,
        tasks: Sequence[str] | None = None,
        models: Mapping[str, object] | None = None,
        pool: str = TINY.name,
        **kwargs: object,
    ):
        check_keys(kwargs, type(self))
        settings = PoolSettings.read({"seed": seed, "tasks": tasks, "pool": pool}, "modelpool")
        known = Pool.named(settings.pool).tasks
        self.pool = settings.pool
        self.seed, self.tasks = settings.seed, settings.tasks or list(known)
        for task in self.tasks:
            if task not in known:
                raise unknown_key(task, known, "task").under("modelpool.tasks")
        folder = ensure_pool(self.seed, self.pool)
        own = {name: str(folder / place) for name, place in folders(self.tasks).items()}
        of = {"seed": self.seed} | ({} if self.pool == TINY.name else {"pool": self.pool})
        arguments = {"processor": own["_pretrained_"], **datasets(self.tasks, **of), **kwargs}
        super().__init__({**own, **(models or {})}, **arguments)

    def load_processor(self, *args: object, **kwargs: object) -> CLIPProcessor:
        """The pool's own makes each image's pixels once; another is loaded as FusionBench does."""
        folder = ensure_pool(self.seed, self.pool) / "pretrained"
        if self._processor == str(folder) and not (args or kwargs):
            return processor_in(folder)
        return super().load_processor(*args, **kwargs)


def folders(tasks: Iterable[str]) -> dict[str, str]:
    """Where in an embedded pool's folder each model lies."""
    return {"_pretrained_": "pretrained", **{name: f"experts/{name}" for name in tasks}}


def datasets(tasks: Iterable[str], **of: object) -> dict[str, DictConfig]:
    """The configs of an embedded pool's data sets, as FusionBench's model pools take them."""
    return {
        f"{key}_datasets": OmegaConf.create(
            {name: target(load_dataset, task=name, split=split, **of) for name in tasks}
        )
        for key, split in zip(("train", "val", "test"), SPLITS, strict=True)
    }


def target(function: object, **arguments: object) -> dict[str, object]:
    """The config of a call."""
    return {"_target_": f"{function.__module__}.{function.__qualname__}", **arguments}


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

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": Image.fromarray(self.images[index]), "label": int(self.labels[index])}


def load_dataset(task: str, split: str, seed: int = 0, pool: str = TINY.name) -> EmbeddedDataset:
    """A split of a task of an embedded pool.

    Raises:
        ConfigError: no such task, split or pool.
    """
    tasks = Pool.named(pool).tasks
    if task not in tasks:
        raise ConfigError("task", f"the embedded pool has no {task!r}", ", ".join(tasks))
    if split not in SPLITS:
        raise ConfigError("split", f"the embedded pool has no {split!r}", ", ".join(SPLITS))
    with np.load(ensure_pool(seed, pool) / "data" / f"{task}.npz") as data:
        return EmbeddedDataset(data[f"{split}_images"], data[f"{split}_labels"])


def load_clip(seed: int = 0, pool: str = TINY.name) -> CLIPModel:
    """An embedded pool's pre-trained CLIP, both towers."""
    return CLIPModel.from_pretrained(ensure_pool(seed, pool) / "pretrained")


def load_processor(seed: int = 0, pool: str = TINY.name) -> CLIPProcessor:
    """The image processor and tokenizer of an embedded pool."""
    return processor_in(ensure_pool(seed, pool) / "pretrained")


def register_tasks() -> None:
    """Tells FusionBench the class names and captions of the embedded tasks it does not know."""
    for pool in POOLS.values():
        for task in pool.tasks.values():
            if task.name in CLIPTemplateFactory.get_available_datasets():
                continue
            info = {"classnames": list(task.classnames), "templates": task.templates}
            # ``dataset_info`` as well: without it FusionBench stores them under a wrong key.
            CLIPTemplateFactory.register_dataset(task.name, dataset_info=info, **info)
