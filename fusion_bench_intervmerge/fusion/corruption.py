"""Images as a bad camera gives them: the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field
from torch.utils.data import Dataset

from ..config import Seed, Settings
from ..data import generator_of

# Severity 1 to 5. Noise: standard deviation, of pixels from 0 to 1, as in ImageNet-C. Blur: radius
# of the Gaussian, as a share of the shorter side.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR = (0.01, 0.02, 0.03, 0.04, 0.06)


class StreamSettings(Settings):
    """The settings of a ``..._union`` task pool.

    Args:
        corruption: ``noise``, ``blur``, or null.
        severity: 1 to 5.
        stream_seed: decides the order of the images, and the noise.
    """

    corruption: Literal["noise", "blur"] | None = Field(
        default=None, description="null, noise, blur"
    )
    severity: Annotated[int, Field(ge=1, le=5, description="a whole number, 1 to 5")] = 3
    stream_seed: Seed = 0


class Corrupted(Dataset):
    """A data set whose images are spoilt; labels stay.

    Args:
        dataset: items are ``{"image": PIL.Image, "label": int}`` or pairs of both.
        task: its name; the noise follows from (seed, task, index).
        settings: how.
    """

    def __init__(self, dataset: Sequence, task: str, settings: StreamSettings):
        self.dataset, self.task, self.settings = dataset, task, settings

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, object]:
        item = self.dataset[index]
        image, label = (item["image"], item["label"]) if isinstance(item, dict) else item
        return {"image": self._spoilt(image.convert("RGB"), index), "label": label}

    def _spoilt(self, image: Image.Image, index: int) -> Image.Image:
        level = self.settings.severity - 1
        if self.settings.corruption == "blur":
            return image.filter(ImageFilter.GaussianBlur(BLUR[level] * min(image.size)))
        seed = generator_of(self.settings.stream_seed, f"noise {index}", self.task).initial_seed()
        pixels = np.asarray(image) / 255
        noise = np.random.default_rng(seed).normal(0, NOISE[level], pixels.shape)
        return Image.fromarray(np.uint8(np.clip(pixels + noise, 0, 1) * 255))
