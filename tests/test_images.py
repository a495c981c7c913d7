"""Images as they come: every mode, either way up, one pixel high; and what is no image."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from fusion_bench_intervmerge.deploy.images import decode_image, pixel_values

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
PROCESSOR = CLIPImageProcessor(
    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=0
)


def file(image, form="png", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_of_size(width, height):
    """A few bytes that say they are an image of that size."""
    content = b"\x89PNG\r\n\x1a\n"
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(100)))):
        checked = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checked
    return content


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpeg"), ("1", "bmp")],
)
def test_every_mode_becomes_rgb(mode, form):
    image = Image.fromarray(PIXELS).convert(mode)
    decoded = decode_image(file(image, form))
    assert decoded.mode == "RGB" and decoded.size == (50, 40)
    if form != "jpeg":
        np.testing.assert_array_equal(decoded, image.convert("RGB"))


def test_16_bits_are_scaled():
    grey = np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32
    decoded = np.asarray(decode_image(file(Image.fromarray(grey))))
    np.testing.assert_array_equal(decoded, (grey // 257).astype(np.uint8)[..., None].repeat(3, 2))


def test_a_turned_photo_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise
    decoded = decode_image(file(Image.fromarray(PIXELS), exif=exif))
    np.testing.assert_array_equal(decoded, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("shape", [(1, 50), (3, 50), (3, 3), (1, 1), (50, 1)])
def test_few_pixels_are_not_taken_for_channels(shape):
    height, width = shape
    image = Image.fromarray(PIXELS[:1, :1].repeat(height, 0).repeat(width, 1))
    pixels = pixel_values(PROCESSOR, [decode_image(file(image))])
    wanted = pixel_values(PROCESSOR, [Image.fromarray(PIXELS[:1, :1].repeat(40, 0).repeat(40, 1))])
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, wanted)


def test_the_pixels_are_the_processors():
    image = Image.fromarray(PIXELS)
    own = PROCESSOR(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values(PROCESSOR, [image]), own)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"not an image \(PNG, JPEG, WEBP, GIF, BMP\)"),
        (b"GIF99", "not an image"),
        (file(Image.fromarray(PIXELS))[:2000], "damaged"),
        (png_of_size(60_000, 60_000), "too many pixels"),
        (png_of_size(8_000, 8_000), "too many pixels"),
        (file(Image.new("RGB", (500, 4))), "one side is more than 100 times the other"),
    ],
)
def test_what_is_no_image(content, said):
    with pytest.raises(ValueError, match=rf"\A{said}"):
        decode_image(content)
