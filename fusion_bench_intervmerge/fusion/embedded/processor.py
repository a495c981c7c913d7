"""An image processor that does each image once: every model of a comparison reads the same ones."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, CLIPProcessor

# Of 32 x 32 pixels: 100 MB in float32, the test splits of two pools.
REMEMBERED = 8192
TENSORS = {"return_tensors": "pt"}


class RememberingProcessor(CLIPProcessor):
    """Hugging Face's processor of a CLIP, which keeps what it made of small single images.

    For an image of the embedded pools processing takes longer than its share of a batch's forward
    pass, and FusionBench's data sets ask for it one by one, anew for every model.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """As the class it derives from; another tensor each time."""
        match args, kwargs:  # one image, as FusionBench's data sets ask for it
            case (), {"images": [Image.Image(mode="RGB") as image], **rest} if rest == TENSORS:
                pixels = self._remembered(image.size, image.tobytes())
                return BatchFeature({"pixel_values": pixels.clone()})
        return super().__call__(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the class it derives from, whose name in the files is known to ``AutoProcessor``."""
        return CLIPProcessor(self.image_processor, self.tokenizer).save_pretrained(*args, **kwargs)

    # The instances are few and as old as the process (see ``processor_in``).
    @lru_cache(maxsize=REMEMBERED)  # noqa: B019
    def _remembered(self, size: tuple[int, int], pixels: bytes) -> Tensor:
        image = Image.frombytes("RGB", size, pixels)
        found: Tensor = super().__call__(images=[image], **TENSORS)["pixel_values"]
        return found


@cache
def processor_in(folder: Path) -> RememberingProcessor:
    """The one of a CLIP's folder; the same object each time."""
    processor: RememberingProcessor = RememberingProcessor.from_pretrained(folder)
    return processor
