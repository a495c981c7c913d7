"""The embedded pools by name. One more pool is one more :class:`Pool` here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import unknown_key
from . import mini, tasks
from .mini import Collection
from .recipe import Recipe
from .tasks import Task


@dataclass(frozen=True)
class Pool:
    """A pretrained CLIP and an expert for every task.

    Attributes:
        name: of the folder in the cache and of the configs.
        tasks: by their names.
        collections: what pre-training sees; None: the train splits of the tasks.
    """

    name: str
    tasks: Mapping[str, Task]
    recipe: Recipe
    collections: Callable[[Any], Iterator[Collection]] | None = None

    @classmethod
    def named(cls, name: str, seed: int = 0) -> Pool:
        """Raises :class:`ConfigError` where there is none of that name."""
        if name not in POOLS:
            raise unknown_key(name, POOLS, "pool").under("modelpool.pool")
        return POOLS[name].seeded(seed)

    def seeded(self, seed: int) -> Pool:
        """The same with other images, initial weights and batches."""
        return replace(self, recipe=replace(self.recipe, seed=seed))

    def to_json(self) -> str:
        """The recipe with the class names and captions that its zero-shot heads are made of."""
        words = {name: [task.classnames, task.prompts] for name, task in self.tasks.items()}
        return json.dumps({**asdict(self.recipe), "tasks": words}, indent=2)

    def digest(self) -> str:
        """Twelve hexadecimal digits that tell this recipe and its seed from every other."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


TINY = Pool("clip-vit-tiny_TA8", tasks.TASKS, Recipe())
MINI = Pool("clip-vit-mini_TA8", mini.TASKS, mini.MiniRecipe(), mini.collections)
POOLS = {pool.name: pool for pool in (TINY, MINI)}
