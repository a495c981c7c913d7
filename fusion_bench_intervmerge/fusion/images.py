"""Images of a pool's data sets, of any mode and shape, made ready for an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from fusion_bench.dataset import ImageClassificationDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, ProcessorMixin

from ..config import ConfigError, Json
from ..deploy.images import check_shape, pixel_values, upright

T = TypeVar("T")


def preprocessed(dataset: Sequence[Any], processor: Any, where: str) -> ImageClassificationDataset:
    """A data set's images, preprocessed: items are (pixel values, label), -1 for no label.

    Args:
        dataset: as ``Items`` takes it.
        processor: a processor of transformers, or PIL image -> pixel values.
        where: the data set's config key, for errors.
    """
    # any function will do, against its annotation
    prepare: Any = None if processor is None else partial(_pixels, processor)
    return ImageClassificationDataset(Items(dataset, where), prepare)


def prepare_images(task_pool: Any) -> None:
    """Let a task pool that is set up read its images as ``preprocessed`` does."""
    for task, data in task_pool.test_datasets.items():  # the loaders have them already
        where = f"taskpool.test_datasets.{task}"
        vars(data).update(vars(preprocessed(data.dataset, data.processor, where)))


class Items(Dataset[Any]):
    """A data set's items as ``{"image": ..., "label": ...}``, the images upright and in RGB.

    Args:
        dataset: items are pairs of image and label, or mappings with ``image`` and perhaps
            ``label``; -1 stands for no label.
        where: the data set's config key, for errors.

    Raises:
        ConfigError: an item cannot be read, has no image, or one that is too long for its width.
    """

    def __init__(self, dataset: Sequence[Any], where: str):
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Json:
        where = f"{self.where}[{index}]"
        item = load_or_explain(lambda: self.dataset[index], where, "images that PIL can read")
        if isinstance(item, (tuple, list)) and len(item) == 2:
            item = {"image": item[0], "label": item[1]}
        if not isinstance(item, dict) or "image" not in item:
            given = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
            allowed = "items with `image` (and `label`), or pairs of both"
            raise ConfigError(self.where, f"items hold {given}, and no image", allowed)
        image = item["image"]
        if not isinstance(image, Image.Image):
            raise ConfigError(where, f"its image is a {type(image).__name__}", "PIL images")
        try:
            check_shape(image)
            image = upright(image)
        except Exception as error:  # a decoder raises almost anything for bytes that are damaged
            raise ConfigError(where, f"{error}", "images that PIL can read") from None
        return {"label": -1, **item, "image": image}


def _pixels(processor: Any, image: Image.Image) -> Tensor:
    if not isinstance(processor, (ProcessorMixin, BaseImageProcessor)):
        return processor(image)
    if image.height in (1, 3):  # which looks as if the channels came first
        return pixel_values(getattr(processor, "image_processor", processor), [image])[0]
    return processor(images=[image], return_tensors="pt")["pixel_values"][0]


def load_or_explain(load: Callable[[], T], where: str, allowed: str) -> T:
    """Load something that may be far away.

    Raises:
        ConfigError: it failed, for any reason: the errors of a hub, of file readers and of users'
            own configs have no class in common.
    """
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        reason = message if len(message) <= 200 else f"{message[:197]}..."
        raise ConfigError(where, f"could not be loaded ({reason})", allowed) from error
