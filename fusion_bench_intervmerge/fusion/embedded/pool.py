"""The embedded pool as FusionBench sees it: a model pool, and the parts a task pool is made of."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fusion_bench.modelpool.clip_vision.modelpool import CLIPVisionModelPool
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pydantic import Field
from transformers import BatchFeature, CLIPModel, CLIPProcessor

from ...config import ConfigError, Folder, Seed, Settings, check_task_name, unknown_key, whole
from ...tinyclip.pools import ABOUT, POOLS, TINY, Pool, ensure_pool, load_images
from ...tinyclip.tasks import SIZE, SPLITS, Array
from ..host import one_line, register_classes


class PoolSettings(Settings):
    """An embedded pool's own settings."""

    seed: Seed = 0
    tasks: Annotated[
        list[str] | Annotated[int, whole(1, 8)] | None,
        Field(description="null, a list of the pool's tasks, or 1 to 8, the first of them"),
    ] = None
    pool: Annotated[str, Field(description=f"one of {', '.join(POOLS)}")] = TINY.name
    folder: Folder | None = None


class EmbeddedCLIPVisionModelPool(CLIPVisionModelPool):
    """A small CLIP with eight experts and their datasets; unpacked at first use, offline.

    Args:
        seed: of the pool; only 0 ships.
        tasks: which experts to take, by task, or how many, the first ones; all if None.
        pool: its name, one of those in ``tinyclip/pools.py``.
        folder: of a pool that ``tools/build_pool.py`` built, in place of the one that ships.
        models: further models by name, such as ``_merged_``.
        kwargs: anything else of ``CLIPVisionModelPool``, in place of the pool's own.
    """

    _config_mapping = CLIPVisionModelPool._config_mapping | {
        name: name for name in ("seed", "tasks", "pool", "folder")
    }

    @one_line
    def __init__(
        self,
        seed: int = 0,
        tasks: Sequence[str] | int | None = None,
        models: Mapping[str, object] | None = None,
        pool: str = TINY.name,
        folder: str | None = None,
        **kwargs: object,
    ):
        given = {"seed": seed, "tasks": tasks, "pool": pool, "folder": folder}
        settings, self.tasks = read_settings(type(self), kwargs, given)
        self.seed, self.pool, self.folder = settings.seed, settings.pool, settings.folder
        self._place = pool_folder(self.pool, self.folder)
        own = {name: str(self._place / at) for name, at in folders(self.tasks).items()}
        arguments: dict[str, Any] = {
            "models": {**own, **(models or {})},
            "processor": own["_pretrained_"],
            **datasets(self.tasks, pool=self.pool, folder=self.folder),
        }
        super().__init__(**arguments | kwargs)

    def load_processor(self, *args: object, **kwargs: object) -> CLIPProcessor:
        """The pool's own is :class:`EmbeddedProcessor`; another is loaded as FusionBench does."""
        if self._processor == str(self._place / "pretrained") and not (args or kwargs):
            return _processor(self._place)
        return super().load_processor(*args, **kwargs)


class EmbeddedProcessor(CLIPProcessor):
    """Hugging Face's processor of a CLIP, which looks up the pixels of one image of a pool.

    FusionBench asks for images one by one and anew for every model that it evaluates; for images
    this small, Hugging Face's steps take longer than their share of a batch's forward pass. They
    treat all pixels and channels alike, so a table of 256 values has the same bits.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        match args, kwargs:
            case (), {"images": [Image.Image(mode="RGB", size=(32, 32)) as image], **rest} if (
                rest == {"return_tensors": "pt"}
            ):
                pixels = self._table[np.asarray(image).transpose(2, 0, 1)[None]]
                return BatchFeature({"pixel_values": torch.from_numpy(pixels)})
        return super().__call__(*args, **kwargs)

    @cached_property
    def _table(self) -> Array:
        values = np.resize(np.arange(256, dtype=np.uint8), (SIZE, SIZE, 1)).repeat(3, axis=2)
        pixels = super().__call__(images=[Image.fromarray(values)], return_tensors="np")
        return pixels["pixel_values"][0][0].flatten()[:256]


# Hugging Face writes a processor's class into the files that it saves, and reads it by that name.
EmbeddedProcessor.__name__ = CLIPProcessor.__name__


@cache
def _processor(folder: Path) -> EmbeddedProcessor:
    return EmbeddedProcessor.from_pretrained(folder / "pretrained")


def read_settings(
    cls: type, others: Iterable[str], given: Mapping[str, object]
) -> tuple[PoolSettings, list[str]]:
    """Check the settings of an embedded pool, and prepare for it: its settings, and its tasks.

    Raises:
        ConfigError: a value that does not fit; or another key that no base class has, which
            FusionBench's pools would take.
    """
    bases: tuple[Any, ...] = inspect.getmro(cls)
    names = dict.fromkeys(name for b in bases for name in inspect.signature(b.__init__).parameters)
    for key in others:
        if key not in names:
            shown = [name for name in names if name not in ("self", "args", "kwargs")]
            raise unknown_key(key, shown).under("modelpool")
    settings = PoolSettings.read(given, "modelpool")
    known = list(Pool.named(settings.pool).tasks)
    chosen = settings.tasks if isinstance(settings.tasks, list) else known[: settings.tasks]
    for index, task in enumerate(chosen):
        if task not in known:
            raise unknown_key(task, known, "task").under("modelpool.tasks")
        check_task_name(task, chosen[:index], "modelpool.tasks")
    pool_folder(settings.pool, settings.folder, settings.seed)
    one_thread()
    return settings, chosen


def one_thread() -> None:
    """Let torch work with one thread in this command, unless the user chose a number of threads.

    Encoders this small gain next to nothing from a second thread, and OpenMP's threads spin while
    they wait for one another: beside other work on the machine a run takes many times as long.
    """
    if HydraConfig.initialized() and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(1)


def pool_folder(pool: str = TINY.name, folder: str | None = None, seed: int = 0) -> Path:
    """Where a pool is: the folder that was given, or that of the pool that ships.

    Raises:
        ConfigError: a seed that does not ship, or a folder that is not of this pool.
    """
    if folder is None:
        if seed:
            wanted = f"0, or modelpool.folder={pool}-{seed} after python tools/build_pool.py"
            wanted += f" {pool} {pool}-{seed} --seed {seed} in the repository"
            raise ConfigError("modelpool.seed", f"{seed} does not ship with the package", wanted)
        return ensure_pool(pool)
    place = Path(folder).absolute()
    about = place / ABOUT
    if not about.is_file() or json.loads(about.read_text(encoding="utf-8"))["pool"] != pool:
        wanted = "a folder that tools/build_pool.py built"
        raise ConfigError("modelpool.folder", f"{folder} has no {pool}", wanted)
    return place


def folders(tasks: Iterable[str]) -> dict[str, str]:
    """Where in an embedded pool's folder each model is."""
    return {"_pretrained_": "pretrained", **{name: f"experts/{name}" for name in tasks}}


def datasets(tasks: Iterable[str], **arguments: object) -> dict[str, DictConfig]:
    """The configs of an embedded pool's data sets, as FusionBench's model pools take them."""
    return {
        f"{key}_datasets": OmegaConf.create(
            {name: target(load_dataset, task=name, split=split, **arguments) for name in tasks}
        )
        for key, split in zip(("train", "val", "test"), SPLITS, strict=True)
    }


def target(function: Any, **arguments: object) -> dict[str, object]:
    """The config of a call."""
    return {"_target_": f"{function.__module__}.{function.__qualname__}", **arguments}


def load_dataset(
    task: str, split: str, pool: str = TINY.name, folder: str | None = None
) -> list[dict[str, Any]]:
    """A split of a task of an embedded pool, ``{"image": PIL.Image, "label": int}`` each.

    Raises:
        ConfigError: no such task, split or pool.
    """
    for key, value, known in (("task", task, Pool.named(pool).tasks), ("split", split, SPLITS)):
        if value not in known:
            raise ConfigError(key, f"the embedded pool has no {value!r}", ", ".join(known))
    images, labels = load_images(pool_folder(pool, folder), task, split)
    pairs = zip(map(Image.fromarray, images), labels.tolist(), strict=True)
    return [{"image": image, "label": label} for image, label in pairs]


def load_clip(pool: str = TINY.name, folder: str | None = None) -> CLIPModel:
    """An embedded pool's pretrained CLIP, both towers."""
    return CLIPModel.from_pretrained(pool_folder(pool, folder) / "pretrained")


def load_processor(pool: str = TINY.name, folder: str | None = None) -> CLIPProcessor:
    """The image processor and tokenizer of an embedded pool."""
    return _processor(pool_folder(pool, folder))


def register_tasks() -> None:
    """Tells FusionBench the class names and captions of the embedded tasks it does not know."""
    for pool in POOLS.values():
        for task in pool.tasks.values():
            if task.name in CLIPTemplateFactory.get_available_datasets():
                continue
            register_classes(task.name, task.classnames, task.templates)
