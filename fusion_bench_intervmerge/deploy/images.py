"""Images as they come from files and requests, made ready for an encoder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 32_000_000
# A processor scales the shorter side to the encoder's size, and the longer one with it.
MAX_RATIO = 100


def decode_image(content: bytes) -> Image.Image:
    """An image file's bytes as an upright RGB image; see ``upright``.

    Raises:
        ValueError: why it cannot be read, in one line. Its size is checked before its pixels are
            read.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError("too many pixels") from None
    except Exception:
        raise ValueError(f"not an image ({', '.join(FORMATS)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("too many pixels")
    check_shape(image)
    try:
        return upright(image)
    except Exception:  # a decoder raises almost anything for bytes that are damaged
        raise ValueError("damaged") from None


def check_shape(image: Image.Image) -> None:
    """Raise ValueError if an image is so long that a processor would make it a huge one."""
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"one side is more than {MAX_RATIO} times the other")


def upright(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, turned as its EXIF data say.

    Numbers of 16 bits (modes ``I`` and ``I;16``) are scaled to 8 bits; ``Image.convert`` would clip
    them. An alpha channel is left out, as CLIP's image processors do.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def pixel_values(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """RGB images through transformers' image processor: (batch, 3, image_size, image_size).

    The layout is given: from the shape alone, an image that is one or three pixels high looks as if
    its channels came first.
    """
    arrays = [np.asarray(image) for image in images]
    pixels: Tensor = processor(arrays, input_data_format="channels_last", return_tensors="pt")[
        "pixel_values"
    ]
    return pixels
