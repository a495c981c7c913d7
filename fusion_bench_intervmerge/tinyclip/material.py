"""Real images that ship with the package: MNIST digits, Fashion-MNIST photographs, Noto emoji.

Each kind is one PNG sheet in ``material/``, beside the licences (``NOTICE.md``);
``tools/mini_material.py`` cut the sheets out of public packages.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import ConfigError

FOLDER = Path(__file__).parent / "material"
DIGESTS = "digests.json"
COLUMNS = 64
EACH = 450  # images per class of MNIST and Fashion-MNIST, class by class
PARTS = {"train": (0.0, 0.7), "validation": (0.7, 0.78), "test": (0.78, 1.0)}


@dataclass(frozen=True)
class Emoji:
    """A picture at 32 pixels with its Unicode name and group.

    Attributes:
        picture: uint8, (32, 32, 4), red to alpha.
        tone: 0 (light) to 4 (dark), None for the picture without a skin tone.
        split: that of all pictures of one name, so that none looks like one in another split.
    """

    picture: np.ndarray
    name: str
    group: str
    tone: int | None
    split: str


@cache
def scans(name: str) -> dict[str, list[np.ndarray]]:
    """Split -> label -> images (n, 28, 28), uint8; ``mnist`` or ``fashion_mnist``."""
    images = _cut(name, 28)
    by_label = [images[label * EACH : (label + 1) * EACH] for label in range(10)]
    return {
        split: [label[int(a * EACH) : int(b * EACH)] for label in by_label]
        for split, (a, b) in PARTS.items()
    }


@cache
def emoji() -> tuple[Emoji, ...]:
    """All of them, in Unicode's order."""
    entries = json.loads(verified(FOLDER / "emoji.json").read_text(encoding="utf-8"))
    return tuple(
        Emoji(picture, **entry, split=_split(entry["name"]))
        for picture, entry in zip(_cut("emoji", 32), entries, strict=False)
    )


def sha256(path: Path) -> str:
    """Of the file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verified(path: Path) -> Path:
    """A file that ships, checked against ``digests.json`` beside it.

    Raises:
        ConfigError: it is damaged, or gone.
    """
    digests = json.loads((path.parent / DIGESTS).read_text(encoding="utf-8"))
    if not path.is_file() or sha256(path) != digests[path.name]:
        raise ConfigError(str(path), "damaged, or gone", "the file as the package ships it")
    return path


def _split(name: str) -> str:
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return next(split for split, (start, end) in PARTS.items() if start <= at < end)


def _cut(name: str, side: int) -> np.ndarray:
    """The images of a sheet, row by row, filling included."""
    sheet = np.asarray(Image.open(verified(FOLDER / f"{name}.png")))
    rows, rest = len(sheet) // side, sheet.shape[2:]
    tiles = sheet.reshape(rows, side, COLUMNS, side, *rest).swapaxes(1, 2)
    return tiles.reshape(rows * COLUMNS, side, side, *rest)
