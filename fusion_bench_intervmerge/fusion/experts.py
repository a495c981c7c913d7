"""What a run needs of a model pool: towers, images, zero-shot heads.

What cannot be had is said in one line.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fusion_bench import BaseModelPool
from fusion_bench.dataset import CLIPDataset
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..encoders import VisionTower, as_tower
from ..errors import ConfigError

log = logging.getLogger(__name__)

SPLITS = {
    "test": ("load_test_dataset", "test_datasets"),
    "validation": ("load_val_dataset", "val_datasets"),
    "train": ("load_train_dataset", "train_datasets"),
}
OFFLINE_POOL = "modelpool=clip-vit-tiny_TA8 taskpool=clip-vit-tiny_TA8 need no download"


class ExpertPool:
    """A FusionBench model pool, read as towers.

    Args:
        pool: a ``CLIPVisionModelPool`` or an ``OpenCLIPVisionModelPool``.

    Raises:
        ConfigError: the pool has no experts.
    """

    def __init__(self, pool: BaseModelPool):
        self.pool: Any = pool
        self.tasks: list[str] = list(pool.model_names)
        if not self.tasks:
            raise ConfigError("modelpool.models", "there are no experts", "one model a task")
        self._projection: nn.Linear | None = None

    def tower(self, name: str) -> VisionTower:
        """The model of that name, ``_pretrained_`` and ``_merged_`` included, as a tower.

        Raises:
            ConfigError: its checkpoint cannot be had, or it is no CLIP vision encoder.
        """
        model = self._load(name)
        if self.pool.has_instance_models:
            model = copy.deepcopy(model)  # a live module is the user's, and hooks would stay on it
        return self.wrap(model)

    def check_shapes(self) -> None:
        """Make sure that the models can be merged.

        Raises:
            ConfigError: two models differ in a tensor's shape.
        """
        first = self.pool.all_model_names[0]
        shapes = {n: tuple(p.shape) for n, p in self.tower(first).mergeable().items()}
        for name in self.pool.all_model_names[1:]:
            for tensor, parameter in self.tower(name).mergeable().items():
                if shapes.get(tensor) != tuple(parameter.shape):
                    raise ConfigError(
                        f"modelpool.models.{name}",
                        f"{tensor} has shape {tuple(parameter.shape)}, in {first} "
                        f"{shapes.get(tensor)}",
                        "models of one architecture",
                    )

    def raw(self, name: str) -> nn.Module:
        """The model of that name as the pool gives it.

        Raises:
            ConfigError: its checkpoint cannot be had.
        """
        return self._load(name)

    def wrap(self, model: nn.Module) -> VisionTower:
        """A vision model of this pool's kind as a tower.

        Raises:
            ConfigError: it is no CLIP vision encoder.
        """
        try:
            return as_tower(model, self._visual_projection())
        except TypeError as error:
            raise ConfigError("modelpool", str(error)) from None

    def images(self, task: str, split: str) -> Dataset:
        """A split's images, preprocessed: items are (pixel values, label).

        Raises:
            ConfigError: an unknown split, or the pool has no such data for the task.
        """
        if split not in SPLITS:
            raise ConfigError("data.split", f"there is no split {split!r}", ", ".join(SPLITS))
        method, group = SPLITS[split]
        where = f"modelpool.{group}.{task}"
        if task not in (getattr(self.pool, f"_{group}", None) or {}):
            raise ConfigError(where, f"the pool has no {split} images for this task")
        dataset = _fetch(lambda: getattr(self.pool, method)(task), where)
        return CLIPDataset(dataset, self._processor())

    def head(self, task: str) -> Callable[[Tensor], Tensor] | None:
        """Zero-shot logits from image features (batch, projection_dim), not normalised.

        Returns:
            None for a task without a head in the pool, or whose class names FusionBench does not
            know: one's own experts need neither.
        """
        if hasattr(self.pool, "load_classification_head"):
            if task not in (self.pool._classification_heads or {}):
                return None
            return self.pool.load_classification_head(task).eval()
        from fusion_bench.models.hf_clip import HFCLIPClassifier
        from fusion_bench.tasks.clip_classification import get_classnames_and_templates

        try:
            classnames, templates = get_classnames_and_templates(task)
        except ValueError:
            log.info("no class names are known for task %r, so no predictions", task)
            return None
        # Not through CLIPClassificationMixin: it caches heads on disk by the model's name alone.
        if not hasattr(self, "_classifier"):
            clip = copy.deepcopy(self.pool.load_clip_model("_pretrained_"))
            self._classifier: Any = HFCLIPClassifier(clip, self._processor())
        self._classifier.set_classification_task(classnames, templates)
        weights = self._classifier.zeroshot_weights.detach().clone()
        return lambda features: (
            nn.functional.normalize(features.float(), dim=-1).to(weights.device) @ weights.T
        )

    def about(self) -> dict[str, Any]:
        """What a saved model should know of its CLIP to be of use elsewhere, as JSON values.

        Returns:
            ``base_model``, the pretrained CLIP's id or folder; ``preprocessor``, the settings of
            its image processor; ``classes``, task -> names and templates of the captions, where
            FusionBench knows them. Without what the pool does not tell.
        """
        from fusion_bench.tasks.clip_classification import get_classnames_and_templates

        found: dict[str, Any] = {}
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
        """What the config says of a model: enough to tell one run's models from another's.

        Of a live module nothing can be told.
        """
        config = self.pool._models[name]
        return "a live module" if isinstance(config, nn.Module) else str(config)

    def images_identity(self, task: str, split: str) -> str:
        """What the config says of a split's images."""
        return str((getattr(self.pool, f"_{SPLITS[split][1]}", None) or {}).get(task))

    def _load(self, name: str) -> nn.Module:
        return _fetch(lambda: self.pool.load_model(name), f"modelpool.models.{name}")

    def _processor(self) -> Any:
        if hasattr(self.pool, "test_processor"):
            return self.pool.test_processor
        return _fetch(self.pool.load_processor, "modelpool.processor")

    def _visual_projection(self) -> nn.Linear | None:
        # Only Hugging Face's vision models come without their projection.
        if self._projection is None and hasattr(self.pool, "load_clip_model"):
            where = "modelpool.models._pretrained_"
            config = self.pool._models.get("_pretrained_")
            if config is None or isinstance(config, nn.Module):
                problem = "is missing" if config is None else "is a live module"
                raise ConfigError(
                    where,
                    f"{problem}, so that the visual projection cannot be had",
                    "the id or the folder of a whole CLIP; experts may be live modules",
                )
            clip = _fetch(lambda: self.pool.load_clip_model("_pretrained_"), where)
            self._projection = copy.deepcopy(clip.visual_projection)
        return self._projection


def _fetch(load: Callable[[], Any], where: str) -> Any:
    """Load something that may be far away; one line when it cannot be had."""
    try:
        return load()
    except ConfigError:
        raise
    except (OSError, ConnectionError, EOFError) as error:
        log.debug("%s could not be loaded", where, exc_info=True)
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise ConfigError(
            where, f"cannot be had ({reason})", f"a reachable id or a local folder; {OFFLINE_POOL}"
        ) from None
