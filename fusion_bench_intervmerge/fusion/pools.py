"""A FusionBench model pool as the core takes it: towers, images and zero-shot heads.

What cannot be loaded is one line with the config key, what was looked for, and a way out.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fusion_bench import BaseModelPool
from fusion_bench.dataset import ImageClassificationDataset
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BaseImageProcessor, CLIPModel, CLIPProcessor

from ..config import ConfigError, Json, check_task_name
from ..distillation.loop import FeatureCache
from ..encoders import as_tower
from ..encoders.base import MissingProjectionError, VisionTower, check_expert
from ..encoders.dinov2 import DINOv2Tower
from .experts import checkpoint, load_clip, load_model, warn_of_twins
from .host import one_line
from .images import load_or_explain, prepare_images, preprocessed

log = logging.getLogger(__name__)

T = TypeVar("T")
Head = Callable[[Tensor], Tensor]

SPLITS = {"test": "test", "validation": "val", "train": "train"}  # as FusionBench calls them
OFFLINE_POOL = "modelpool=clip-vit-mini_TA8 taskpool=clip-vit-mini_TA8 need no download"
REACHABLE = f"a reachable id or a local folder; {OFFLINE_POOL}"
WITH_IMAGES = (
    "a pool with images, such as ours (modelpool=clip-vit-b32_TA8), or "
    "+dataset/image_classification/{0}@modelpool.{0}_datasets=[{1},...]"
)
NO_NAMES = "FusionBench knows no class names for this task"
NAMES = "a task that it knows; taskpool=own takes the names that the data set has"
# FusionBench 0.2.33 names these data sets without their owner, which the hub no longer takes.
OWNERS = {"mnist": "ylecun", "svhn": "ufldl-stanford"}

# A pool's methods that read files or a hub -> the config group that says where these are.
LOADS = {
    "load_model": "models",
    "load_clip_model": "models",
    "load_classification_head": "classification_heads",
    "load_train_dataset": "train_datasets",
    "load_val_dataset": "val_datasets",
    "load_test_dataset": "test_datasets",
    "load_processor": "processor",
}


class ExpertPool:
    """A FusionBench model pool, read as towers.

    Args:
        pool: a ``CLIPVisionModelPool`` or an ``OpenCLIPVisionModelPool``.

    Raises:
        ConfigError: the pool has no experts, or a name that cannot name a task.
    """

    def __init__(self, pool: BaseModelPool):
        self.pool: Any = checked_loads(pool)
        self.tasks: list[str] = list(pool.model_names)
        if not self.tasks:
            raise ConfigError("modelpool.models", "there are no experts", "one model per task")
        for index, task in enumerate(self.tasks):
            check_task_name(task, self.tasks[:index], "modelpool.models")
        if "load_model" not in vars(pool):  # for the first on this pool, not for a nested method
            warn_of_twins(self.pool._models, self.tasks)
        self._projection: nn.Linear | None = None
        self._images: dict[tuple[str, str], ImageClassificationDataset] = {}
        self.features = FeatureCache()  # for the next method on this pool
        self.calibrated: dict[str, VisionTower] = {}  # likewise, by what their weights depend on

    @property
    def family(self) -> str:
        """``openclip`` or ``huggingface``."""
        return "openclip" if hasattr(self.pool, "load_classification_head") else "huggingface"

    def tower(self, name: str) -> VisionTower:
        """The model of that name, ``_pretrained_`` and ``_merged_`` included, as a tower.

        Raises:
            ConfigError: its checkpoint is not found, or is not a CLIP vision encoder.
        """
        model = self.pool.load_model(name)
        if self.pool.has_instance_models:
            model = copy.deepcopy(model)  # a live module is the user's, and hooks would stay on it
        return self.wrap(model, f"modelpool.models.{name}")

    def first_tower(self) -> VisionTower:
        """The tower that a run starts from: the pool's merged model, or its first model.

        Raises:
            ConfigError: as in ``tower``.
        """
        return self.tower("_merged_" if self.pool.has_merged else self.pool.all_model_names[0])

    def check_shapes(self) -> None:
        """Check that the models can be merged.

        Raises:
            ConfigError: two models differ in a tensor's shape.
        """
        first, *others = self.pool.all_model_names
        for name in others:
            check_expert(name, self.tower(name), self.tower(first))

    def wrap(self, model: nn.Module, where: str = "base") -> VisionTower:
        """A vision model of this pool's kind as a tower.

        Raises:
            ConfigError: it is not a CLIP vision encoder.
        """
        try:
            try:
                tower = as_tower(model)
            except MissingProjectionError:
                return as_tower(model, self._visual_projection())
            if isinstance(tower, DINOv2Tower):  # its config may be of larger images
                tower = DINOv2Tower(tower.model, self._image_size(), tower.pooling)
            return tower
        except TypeError as error:
            raise ConfigError(where, str(error), "models of one CLIP architecture") from None

    def images(self, task: str, split: str) -> ImageClassificationDataset:
        """A split's images, preprocessed: items are (pixel values, label), -1 for no label.

        Raises:
            ConfigError: an unknown split, or the pool has no such data for the task, or none that
                can be read.
        """
        if split not in SPLITS:
            raise ConfigError("data.split", f"there is no split {split!r}", ", ".join(SPLITS))
        where = f"modelpool.{SPLITS[split]}_datasets.{task}"
        if task not in self._datasets(split):
            problem = f"the pool has no {split} images for this task"
            raise ConfigError(where, problem, WITH_IMAGES.format(SPLITS[split], self.tasks[0]))
        if (task, split) not in self._images:
            dataset = getattr(self.pool, f"load_{SPLITS[split]}_dataset")(task)
            images = preprocessed(dataset, self._processor(), where)
            if len(images):
                images.dataset[0]  # a mistake in all of them is reported before the merge
            self._images[task, split] = images
        return self._images[task, split]

    def head(self, task: str) -> Head | None:
        """Logits from image features (batch, projection_dim), not normalised.

        They are zero-shot, or of an image classifier its own head's.

        Returns:
            None for a task without a head in the pool, or whose class names FusionBench does not
            know: your own experts need neither.
        """
        if self.family == "openclip":
            if task not in (self.pool._classification_heads or {}):
                return None
            return self.pool.load_classification_head(task).eval()
        if not hasattr(self.pool, "load_clip_model"):
            return getattr(self.pool.load_model(task).classifier, "head", None)
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
            its image processor; ``classes``, task -> names and templates of the captions, if
            FusionBench knows them. Keys that the pool does not tell are left out.
        """
        about: Json = {}
        base = checkpoint(self.pool._models.get("_pretrained_"))
        if self.family == "huggingface" and base is not None:
            about["base_model"] = base
        processor = self._processor()
        images = getattr(processor, "image_processor", processor)
        if isinstance(images, BaseImageProcessor):
            about["preprocessor"] = json.loads(images.to_json_string())
        classes = {}
        for task in self.tasks:
            try:
                names, functions = get_classnames_and_templates(task)
            except ValueError:
                continue
            templates = [function("{}") for function in functions]
            pairs = list(zip(templates, functions, strict=True))
            # A template may be any function; only those that a text can express are saved.
            if all(text.format(name) == say(name) for text, say in pairs for name in names):
                classes[task] = {"names": list(names), "templates": templates}
        return about | ({"classes": classes} if classes else {})

    def identity(self, tasks: Sequence[str], split: str) -> Json:
        """What the config says of these tasks' experts and images; it tells runs apart."""
        return {
            "experts": {task: str(self.pool._models[task]) for task in tasks},
            "images": {task: str(self._datasets(split).get(task)) for task in tasks},
        }

    def _datasets(self, split: str) -> Mapping[str, object]:
        return getattr(self.pool, f"_{SPLITS[split]}_datasets", None) or {}

    def _processor(self) -> CLIPProcessor:
        openclip = hasattr(self.pool, "test_processor")
        return self.pool.test_processor if openclip else self.pool.load_processor()

    def _image_size(self) -> int:
        blank = preprocessed([(Image.new("RGB", (64, 64)), 0)], self._processor(), "processor")
        return blank[0][0].shape[-1]

    def _visual_projection(self) -> nn.Linear | None:
        # Only Hugging Face's vision models come without their projection.
        if self._projection is None and hasattr(self.pool, "load_clip_model"):
            config = self.pool._models.get("_pretrained_")
            if config is None or isinstance(config, nn.Module):
                problem = "is missing" if config is None else "is a live module"
                problem += ", so that there is no visual projection"
                allowed = "the id or the folder of a whole CLIP; experts may be live modules"
                raise ConfigError("modelpool.models._pretrained_", problem, allowed)
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


# -- loading -------------------------------------------------------------------------------------


def checked_loads(pool: BaseModelPool) -> BaseModelPool:
    """A copy of a model pool whose loads raise a ``ConfigError`` if they fail.

    Nested methods, which load what they merge themselves, get it too. The pool stays as it is.
    """
    pool = copy.copy(pool)
    for name, group in LOADS.items():
        vars(pool).pop(name, None)  # from a copy of a copy
        if hasattr(pool, name):
            load = getattr(pool, name)
            if name == "load_model":
                load = partial(load_model, pool, load)
            elif name == "load_clip_model":
                load = partial(load_clip, pool, load)
            setattr(pool, name, partial(_load, load, group, getattr(pool, f"_{group}", None)))
    return pool


def prepare_task_pool(program: object) -> None:
    """Load what the evaluation needs, so that what is missing is said before the repair.

    Raises:
        ConfigError: data, the CLIP or the processor of the task pool cannot be loaded.
    """
    pool = getattr(program, "taskpool", None)
    if isinstance(pool, CLIPVisionModelTaskPool):
        configs: Mapping[str, object] = pool._test_datasets
        for name, config in configs.items():
            _owned(config, f"taskpool.test_datasets.{name}")
        if not pool._is_setup:
            load_or_explain(pool.setup, "taskpool", REACHABLE)
        if not hasattr(pool, "after_evaluation"):  # FusionBench's own
            prepare_images(pool)
            vars(pool)["evaluate"] = one_line(pool.evaluate)
        datasets: Any = pool.test_datasets
        for name, dataset in datasets.items():
            where = f"taskpool.test_datasets.{name}"
            _, label = load_or_explain(partial(dataset.__getitem__, 0), where, REACHABLE)
            if label == -1:
                raise ConfigError(where, "its images have no labels", "labelled images")
            try:
                get_classnames_and_templates(name)
            except ValueError:
                raise ConfigError(where, NO_NAMES, NAMES) from None


def _load(
    load: Callable[..., T], group: str, configs: object, *args: object, **kwargs: object
) -> T:
    name = args[0] if args and isinstance(args[0], str) else None
    where = f"modelpool.{group}" + (f".{name}" if name else "")
    config = configs.get(name) if name and isinstance(configs, Mapping) else None
    allowed = _owned(config, where) if group.endswith("_datasets") else ""
    return load_or_explain(lambda: load(*args, **kwargs), where, allowed or REACHABLE)


def _owned(config: object, where: str) -> str:
    """The hub's name of a data set that a config names without its owner; else nothing.

    Raises:
        ConfigError: a folder of that name would be read in its place.
    """
    for name, owner in OWNERS.items():
        if f"'{name}'" in str(config) and "datasets.load_dataset" in str(config):
            allowed = f"the hub's {owner}/{name}, as in modelpool=clip-vit-b32_TA8 and our others"
            if Path(name).is_dir():
                problem = f"the folder {name} here would be read in place of the data set"
                raise ConfigError(where, problem, allowed)
            return allowed
    return ""
