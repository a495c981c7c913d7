"""What a run needs of a model pool: towers, images, zero-shot heads.

What is not found is said in one line.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusion_bench import BaseModelPool
from fusion_bench.dataset import CLIPDataset
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from transformers import CLIPModel, CLIPProcessor

from ..config import ConfigError, Json, check_task_name
from ..encoders import as_tower
from ..encoders.base import MissingProjectionError, VisionTower, check_expert
from .hub import fetch, watched

log = logging.getLogger(__name__)

Head = Callable[[Tensor], Tensor]
SPLITS = {"test": "test", "validation": "val", "train": "train"}  # as FusionBench calls them


class ExpertPool:
    """A FusionBench model pool, read as towers.

    Args:
        pool: a ``CLIPVisionModelPool`` or an ``OpenCLIPVisionModelPool``.

    Raises:
        ConfigError: the pool has no experts, or a name that no task may have.
    """

    def __init__(self, pool: BaseModelPool):
        self.pool: Any = watched(pool)
        self.tasks: list[str] = list(pool.model_names)
        if not self.tasks:
            raise ConfigError("modelpool.models", "there are no experts", "one model a task")
        for index, task in enumerate(self.tasks):
            check_task_name(task, self.tasks[:index], "modelpool.models")
        self._projection: nn.Linear | None = None
        self._images: dict[tuple[str, str], CLIPDataset] = {}

    @property
    def family(self) -> str:
        """``openclip`` or ``huggingface``."""
        return "openclip" if hasattr(self.pool, "load_classification_head") else "huggingface"

    def tower(self, name: str) -> VisionTower:
        """The model of that name, ``_pretrained_`` and ``_merged_`` included, as a tower.

        Raises:
            ConfigError: its checkpoint is not found, or it is no CLIP vision encoder.
        """
        model = self.pool.load_model(name)
        if self.pool.has_instance_models:
            model = copy.deepcopy(model)  # a live module is the user's, and hooks would stay on it
        return self.wrap(model, f"modelpool.models.{name}")

    def first_tower(self) -> VisionTower:
        """The tower that a run starts from: a merged model of the pool's, or its first one.

        Raises:
            ConfigError: as in ``tower``.
        """
        return self.tower("_merged_" if self.pool.has_merged else self.pool.all_model_names[0])

    def check_shapes(self) -> None:
        """Make sure that the models can be merged.

        Raises:
            ConfigError: two models differ in a tensor's shape.
        """
        first, *others = self.pool.all_model_names
        for name in others:
            check_expert(name, self.tower(name), self.tower(first))

    def raw(self, name: str) -> nn.Module:
        """The model of that name as the pool gives it, or a ConfigError: it is not found."""
        return self.pool.load_model(name)

    def wrap(self, model: nn.Module, where: str = "base") -> VisionTower:
        """A vision model of this pool's kind as a tower.

        Raises:
            ConfigError: it is no CLIP vision encoder.
        """
        try:
            try:
                return as_tower(model)
            except MissingProjectionError:
                return as_tower(model, self._visual_projection())
        except TypeError as error:
            raise ConfigError(where, str(error), "models of one CLIP architecture") from None

    def images(self, task: str, split: str) -> CLIPDataset:
        """A split's images, preprocessed: items are (pixel values, label), -1 for no label.

        Raises:
            ConfigError: an unknown split, or the pool has no such data for the task, or none that
                can be read.
        """
        if split not in SPLITS:
            raise ConfigError("data.split", f"there is no split {split!r}", ", ".join(SPLITS))
        where = f"modelpool.{SPLITS[split]}_datasets.{task}"
        if task not in self._datasets(split):
            raise ConfigError(where, f"the pool has no {split} images for this task")
        if (task, split) not in self._images:
            items = _Items(getattr(self.pool, f"load_{SPLITS[split]}_dataset")(task), where)
            if len(items):
                items[0]  # what all of them lack is said before the merge
            self._images[task, split] = CLIPDataset(items, self._processor())
        return self._images[task, split]

    def head(self, task: str) -> Head | None:
        """Zero-shot logits from image features (batch, projection_dim), not normalised.

        Returns:
            None for a task without a head in the pool, or whose class names FusionBench does not
            know: one's own experts need neither.
        """
        if hasattr(self.pool, "load_classification_head"):
            if task not in (self.pool._classification_heads or {}):
                return None
            return self.pool.load_classification_head(task).eval()
        try:
            get_classnames_and_templates(task)
        except ValueError:
            log.info("no class names are known for task %r, so no predictions", task)
            return None
        if not hasattr(self, "_clip"):
            self._clip = copy.deepcopy(self.pool.load_clip_model("_pretrained_"))
        return zero_shot_head(self._clip, self._processor(), task)

    def about(self) -> Json:
        """What a saved model should know of its CLIP to be of use elsewhere, as JSON values.

        Returns:
            ``base_model``, the pretrained CLIP's id or folder; ``preprocessor``, the settings of
            its image processor; ``classes``, task -> names and templates of the captions, where
            FusionBench knows them. Without what the pool does not tell.
        """
        found: Json = {}
        config = self.pool._models.get("_pretrained_")
        if isinstance(config, Mapping):
            config = config.get("pretrained_model_name_or_path")
        if hasattr(self.pool, "load_clip_model") and isinstance(config, str):
            found["base_model"] = config
        images = getattr(self._processor(), "image_processor", None)
        if images is not None:
            found["preprocessor"] = json.loads(images.to_json_string())
        classes = {}
        for task in self.tasks:
            try:
                names, functions = get_classnames_and_templates(task)
            except ValueError:
                continue
            templates = [function("{}") for function in functions]
            pairs = list(zip(templates, functions, strict=True))
            # A template may be any function; kept are those that a text can say.
            if all(text.format(name) == say(name) for text, say in pairs for name in names):
                classes[task] = {"names": list(names), "templates": templates}
        return found | ({"classes": classes} if classes else {})

    def identity(self, name: str) -> str:
        """What the config says of a model; of a live module it says nothing."""
        config = self.pool._models[name]
        return "a live module" if isinstance(config, nn.Module) else str(config)

    def images_identity(self, task: str, split: str) -> str:
        """What the config says of a split's images."""
        return str(self._datasets(split).get(task))

    def _datasets(self, split: str) -> Mapping[str, object]:
        return getattr(self.pool, f"_{SPLITS[split]}_datasets", None) or {}

    def _processor(self) -> CLIPProcessor:
        openclip = hasattr(self.pool, "test_processor")
        return self.pool.test_processor if openclip else self.pool.load_processor()

    def _visual_projection(self) -> nn.Linear | None:
        # Only Hugging Face's vision models come without their projection.
        if self._projection is None and hasattr(self.pool, "load_clip_model"):
            where = "modelpool.models._pretrained_"
            config = self.pool._models.get("_pretrained_")
            if config is None or isinstance(config, nn.Module):
                problem = "is missing" if config is None else "is a live module"
                problem += ", so that there is no visual projection"
                allowed = "the id or the folder of a whole CLIP; experts may be live modules"
                raise ConfigError(where, problem, allowed)
            clip = self.pool.load_clip_model("_pretrained_")
            self._projection = copy.deepcopy(clip.visual_projection)
        return self._projection


def zero_shot_head(clip: CLIPModel, processor: CLIPProcessor, task: str) -> Head:
    """Logits of image features (batch, projection_dim) for the classes of a task.

    Not through ``CLIPClassificationMixin``: it caches heads on disk by the model's name alone.

    Raises:
        ValueError: FusionBench does not know the task's classes.
    """
    classifier: Any = HFCLIPClassifier(clip, processor)
    classifier.set_classification_task(*get_classnames_and_templates(task))
    weights = classifier.zeroshot_weights
    return lambda features: normalize(features.float(), dim=-1).to(weights.device) @ weights.T


class _Items(Dataset):
    """A data set's items as ``{"image": ..., "label": ...}``; -1 stands for no label.

    Args:
        dataset: items are mappings with ``image``, and with ``label`` where there is one, or pairs.
        where: the data set's config key, for errors.

    Raises:
        ConfigError: an item cannot be read, or has no image.
    """

    def __init__(self, dataset: Sequence, where: str):
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Json:
        item = fetch(lambda: self.dataset[index], f"{self.where}[{index}]")
        if isinstance(item, (tuple, list)) and len(item) == 2:
            item = {"image": item[0], "label": item[1]}
        if not isinstance(item, dict) or "image" not in item:
            found = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
            allowed = "items with `image` (and `label`), or pairs of both"
            raise ConfigError(self.where, f"items hold {found}, and no image", allowed)
        return {"label": -1, **item}
