"""The embedded pools: their tasks, and their weights, which ship and are unpacked at first use.

``weights/<pool>/`` holds the tokenizer and ``weights.safetensors``: the pretrained CLIP in half
precision, and each expert's difference from it. ``tools/build_pool.py`` of the repository trained
them; it also builds pools of other seeds.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    CLIPVisionModel,
)

from ..config import ConfigError, unknown_key
from ..files import CACHE_VARIABLE, atomic_file, cache_root
from . import mini, tasks
from .material import DIGESTS, verified
from .tasks import SIZE, Array, Task

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"
ABOUT = "pool.json"
IMAGES = {"train": 2400, "validation": 300, "test": 480}
"""Split -> images per task."""
MEAN, STD = 0.5, 0.28
"""Pixel statistics of the drawn images, rounded."""
CONTEXT = 16
"""Tokens that a caption may have."""


@dataclass(frozen=True)
class Pool:
    """A pretrained CLIP and an expert for every task.

    Attributes:
        name: of the folder in the cache and of the configs.
        tasks: by name.
    """

    name: str
    tasks: Mapping[str, Task]

    @classmethod
    def named(cls, name: str) -> Pool:
        """Raises :class:`ConfigError` if there is none of that name."""
        if name not in POOLS:
            raise unknown_key(name, POOLS, "pool").under("modelpool.pool")
        return POOLS[name]

    def digest(self) -> str:
        """Twelve hexadecimal digits of what decides weights, images and zero-shot heads."""
        words = {name: [task.classnames, task.prompts] for name, task in self.tasks.items()}
        weights = (WEIGHTS / self.name / DIGESTS).read_text(encoding="utf-8")
        content = json.dumps([weights, words, IMAGES, tasks.REVISION])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


TINY = Pool("clip-vit-tiny_TA8", tasks.TASKS)
MINI = Pool("clip-vit-mini_TA8", mini.TASKS)
POOLS = {pool.name: pool for pool in (TINY, MINI)}


def ensure_pool(pool: str = TINY.name) -> Path:
    """The folder of a pool in the cache, unpacked at first use.

    It takes its name when it is whole. Of processes that unpack at once, the first one's stays.

    Returns:
        a folder with ``pretrained/`` (a CLIPModel and its processor), ``experts/<task>/``
        (CLIPVisionModels) and ``pool.json``; see :func:`load_images` for its images.

    Raises:
        ConfigError: no such pool, a damaged file, or the cache folder cannot be written.
    """
    chosen, root = Pool.named(pool), cache_root()
    folder = root / f"{pool}-{chosen.digest()}"
    if folder.is_dir():
        return folder
    log.info("unpacking %s, once, in %s", pool, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".unpacking-", dir=root) as temporary:
            part = Path(temporary) / pool
            unpack(chosen, part)
            try:
                part.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        problem = f"the cache folder {root} cannot be written ({getattr(error, 'strerror', error)})"
        raise ConfigError(CACHE_VARIABLE, problem, "any folder you can write") from error
    return folder


def unpack(pool: Pool, folder: Path) -> None:
    """Write the models of a pool that ships.

    Raises:
        ConfigError: a file is not what its digest says.
    """
    vocabulary, merges, config, weights = (
        verified(WEIGHTS / pool.name / name)
        for name in ("vocab.json", "merges.txt", "config.json", "weights.safetensors")
    )
    model = CLIPModel(CLIPConfig.from_json_file(config))
    expert = CLIPVisionModel(model.config.vision_config)
    with safe_open(weights, "pt") as file, torch.no_grad():
        pretrained = {
            name: file.get_tensor(f"pretrained/{name}").float()
            for name, _ in model.named_parameters()
        }
        model.load_state_dict(pretrained, strict=False)
        model.save_pretrained(folder / "pretrained")
        for task in pool.tasks:
            for name, value in expert.named_parameters():
                value.copy_(pretrained[name] + file.get_tensor(f"{task}/{name}").float())
            expert.save_pretrained(folder / "experts" / task)
    make_processor(vocabulary, merges).save_pretrained(folder / "pretrained")
    describe(folder, pool, 0, IMAGES)


def make_processor(vocabulary: Path, merges: Path) -> CLIPProcessor:
    """A pool's processor, from the files of its tokenizer."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    tokenizer = CLIPTokenizerFast(str(vocabulary), str(merges), model_max_length=CONTEXT)
    return CLIPProcessor(images, tokenizer)


def describe(folder: Path, pool: Pool, seed: int, images: Mapping[str, int]) -> None:
    """Write which pool a folder is, and split -> images per task."""
    about = {"pool": pool.name, "seed": seed, "images": images}
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def load_images(folder: Path, task: str, split: str) -> tuple[Array, Array]:
    """The images of a split of a task, drawn when they are first asked for.

    Args:
        folder: of a pool.

    Returns:
        images, uint8 (n, SIZE, SIZE, 3), and labels, int64 (n,).
    """
    file = folder / "data" / f"{task}-{split}.npz"
    if not file.is_file():
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        chosen = POOLS[about["pool"]].tasks[task]
        images, labels = chosen.images(about["seed"], split, about["images"][split])
        with atomic_file(file) as temporary:
            np.savez(temporary, images=images, labels=labels)
    with np.load(file) as data:
        return data["images"], data["labels"]
