"""Images as they come: every mode, either way up, one pixel high; and what is no image.

From files and requests first, then through the pools of FusionBench.
"""

from __future__ import annotations

import io
import struct
import types
import zlib

import numpy as np
import pytest
import torch
from fusion_bench.taskpool import CLIPVisionModelTaskPool as HostCLIPVisionModelTaskPool
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.data import read_images
from fusion_bench_intervmerge.deploy.images import decode_image, pixel_values
from fusion_bench_intervmerge.fusion.embedded import load_processor
from fusion_bench_intervmerge.fusion.host import OneLineError
from fusion_bench_intervmerge.fusion.hosted import CLIPVisionModelTaskPool
from fusion_bench_intervmerge.fusion.images import preprocessed
from fusion_bench_intervmerge.fusion.pools import prepare_task_pool
from fusion_bench_intervmerge.tinyclip import ensure_pool

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


# -- through FusionBench's pools -------------------------------------------------------------------


class Files(list):
    """A data set that opens files, as people write them; it does not turn what EXIF turns."""

    def __getitem__(self, index):
        return {"image": Image.open(io.BytesIO(super().__getitem__(index))), "label": 1}


def every_kind():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(PIXELS)
    grey16 = np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32
    modes = {"L": "png", "LA": "png", "RGBA": "png", "P": "gif", "CMYK": "jpeg", "1": "bmp"}
    return [
        *(file(image.convert(mode), form) for mode, form in modes.items()),
        file(Image.fromarray(grey16)),
        file(image, exif=exif),
        *(file(image.resize(size)) for size in ((50, 1), (50, 3), (3, 3), (1, 1), (1, 50))),
    ]


def test_pools_read_them_as_the_service_does():
    folder = str(ensure_pool("clip-vit-tiny_TA8") / "pretrained")
    files = every_kind()
    taskpool = CLIPVisionModelTaskPool({"mnist": Files(files)}, processor=folder, clip_model=folder)
    taskpool.setup()
    images = preprocessed(Files(files), taskpool.processor, "modelpool.test_datasets.mnist")
    wanted = pixel_values(taskpool.processor.image_processor, [decode_image(f) for f in files])
    for dataset in (images, taskpool.test_datasets["mnist"]):
        pixels, labels = zip(*[dataset[index] for index in range(len(files))], strict=True)
        assert torch.equal(torch.stack(pixels), wanted) and set(labels) == {1}


def test_an_evaluation_without_labels_is_refused_beforehand():
    folder = str(ensure_pool("clip-vit-tiny_TA8") / "pretrained")
    items = [{"image": Image.fromarray(PIXELS)}]
    pool = CLIPVisionModelTaskPool({"mnist": items}, processor=folder, clip_model=folder)
    with pytest.raises(ConfigError, match=r"\Ataskpool.test_datasets.mnist: its images have no"):
        prepare_task_pool(types.SimpleNamespace(taskpool=pool))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_from_a_worker_too(workers):
    files = Files([every_kind()[0], every_kind()[0][:60]])
    images = preprocessed(files, PROCESSOR, "modelpool.test_datasets.mnist")
    with pytest.raises(ConfigError, match=r"\Amodelpool.test_datasets.mnist\[1\]: .*; allowed: im"):
        list(read_images({"mnist": images}, [[("mnist", 0)], [("mnist", 1)]], workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own", [True, False], ids=["our task pool", "FusionBench's"])
def test_a_broken_image_is_one_line_in_an_evaluation(own, workers, monkeypatch):
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    clip = CLIPModel.from_pretrained(ensure_pool("clip-vit-tiny_TA8") / "pretrained")
    kind = CLIPVisionModelTaskPool if own else HostCLIPVisionModelTaskPool
    pool = kind(
        {"digits": Files([every_kind()[0], every_kind()[0][:60]])},
        processor=load_processor(),
        clip_model=clip,
        dataloader_kwargs={"num_workers": workers},
    )
    prepare_task_pool(types.SimpleNamespace(taskpool=pool))
    with pytest.raises(OneLineError, match=r"\Ataskpool.test_datasets.digits\[1\]: [^\n]*\Z"):
        pool.evaluate(clip.vision_model)


def test_an_evaluation_without_class_names_is_refused_beforehand():
    folder = str(ensure_pool("clip-vit-tiny_TA8") / "pretrained")
    items = [(Image.fromarray(PIXELS), 1)]
    pool = HostCLIPVisionModelTaskPool({"birds": items}, processor=folder, clip_model=folder)
    with pytest.raises(ConfigError, match=r"\Ataskpool.test_datasets.birds: FusionBench knows no"):
        prepare_task_pool(types.SimpleNamespace(taskpool=pool))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("RGB", (500, 4)), "one side is more than 100 times the other"),
        (PIXELS, "its image is a ndarray"),
    ],
)
def test_pools_refuse_what_is_no_image_for_an_encoder(image, said):
    with pytest.raises(ConfigError, match=said):
        preprocessed([(image, 0)], PROCESSOR, "taskpool.test_datasets.mnist")[0]
