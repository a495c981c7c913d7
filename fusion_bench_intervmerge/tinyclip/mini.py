"""The tasks of ``clip-vit-mini_TA8``: real images and drawn ones, as pre-training never shows them.

A plain task shows the look of its source. MNIST and the clothes are used as they are; the other
tasks have a fault that the encoder never saw in pre-training: haze, sensor noise, blinds, a lens
out of focus, coarse pixels. So its features are there, and not quite where the zero-shot heads are.
``tools/mini_pretraining.py`` has what pre-training shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFilter

from . import tasks as tiny
from .material import Emoji, emoji, scans
from .tasks import SIZE, Array, Rng, Task

T = TypeVar("T")

GROUPS = {
    "face": r"face-",
    "person": r"person(-role|-activity|-gesture|-fantasy|-sport)?$",
    "hand": r"hand",
    "animal": r"animal-",
    "flag": r"country-flag$",
    "sign": r"(alphanum|av-symbol|arrow|zodiac|keycap)$",
}
"""The classes of the task ``emoji``, and the Unicode groups of each."""

GARMENTS = (
    *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"),
    *("Bag", "Ankle boot"),
)
CLOTHES = (1, 2, 3, 5, 7, 8, 9)
"""Without the garments that are hard to tell apart at this size."""


# --- plain looks ----------------------------------------------------------------------------------


def scan(rng: Rng, name: str, label: int, split: str) -> Array:
    """A digit or a garment from its source, of a random size at a random place, from 0 to 1."""
    return tiny.placed_scan(rng, scans(name)[split][label])


def on_paper(rng: Rng, picture: Array, light: float = 0.0) -> Array:
    """A picture with transparency, turned and moved a little, on paper at least that light."""
    side = int(rng.integers(25, 33))
    turned = Image.fromarray(picture).rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    turned = turned.resize((side, side), Image.Resampling.BICUBIC)
    paper = tuple(int(v) for v in rng.integers(int(255 * light), 256, 3))
    page = Image.new("RGBA", (SIZE, SIZE), (*paper, 255))
    left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
    page.alpha_composite(turned, (left, top))
    return np.asarray(page)[..., :3] / 255


def choose(rng: Rng, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


@cache
def emoji_by_class(split: str) -> list[list[Emoji]]:
    toneless = [one for one in emoji() if one.split == split and one.tone is None]
    return [[one for one in toneless if re.match(g, one.group)] for g in GROUPS.values()]


def _white_on_black(rng: Rng, name: str, label: int, split: str) -> Array:
    """A scan as its source has it."""
    scene = np.repeat(scan(rng, name, label, split)[..., None], 3, axis=2)
    return scene + rng.uniform(0, 0.03) * rng.normal(size=scene.shape)


def _mnist(rng: Rng, label: int, split: str) -> Array:
    return _white_on_black(rng, "mnist", label, split)


def _fashion(rng: Rng, label: int, split: str) -> Array:
    return _white_on_black(rng, "fashion_mnist", label, split)


def _clothes(rng: Rng, label: int, split: str) -> Array:
    return _fashion(rng, CLOTHES[label], split)


def _faded_emoji(rng: Rng, label: int, split: str) -> Array:
    """As on an old print: yellowed, with little contrast."""
    scene = on_paper(rng, choose(rng, emoji_by_class(split)[label]).picture, light=0.85)
    gray, colour = scene.mean(axis=2, keepdims=True), rng.uniform(0.5, 0.8)
    faded = 0.25 + 0.5 * (gray + colour * (scene - gray)) * (1.1, 1.0, 0.8)
    return faded + rng.uniform(0.01, 0.05) * rng.normal(size=scene.shape)


_DIGITS = tuple("0123456789")
_ABOUT_CLOTHES = ("a photo of a {}.", "a photo of the {}.")
_ABOUT_EMOJI = ("a picture of a {}", "a small {} symbol")

# Class names and prompts of the first two are FusionBench's own.
PLAIN: dict[str, Task] = {
    "mnist": Task("mnist", _DIGITS, ('a photo of the number: "{}".',), _mnist),
    "fashion_mnist": Task("fashion_mnist", GARMENTS, _ABOUT_CLOTHES, _fashion),
    "emoji": Task("emoji", tuple(GROUPS), _ABOUT_EMOJI, _faded_emoji),
    **{name: tiny.TASKS[name] for name in ("digits", "letters", "shapes", "counting", "textures")},
}


# --- faults that pre-training never shows ---------------------------------------------------------


def _in_haze(rng: Rng, scene: Array) -> Array:
    return 0.5 + rng.uniform(0.3, 0.45) * (scene - 0.5)


def _at_night(rng: Rng, scene: Array) -> Array:
    return scene + rng.uniform(0.1, 0.2) * rng.normal(size=scene.shape)


def _through_blinds(rng: Rng, scene: Array) -> Array:
    slats = (np.arange(SIZE) + rng.integers(4)) % 4 < 2
    return scene * np.where(slats, 0.4, 1)[:, None, None]


def _out_of_focus(rng: Rng, scene: Array) -> Array:
    picture = Image.fromarray((scene * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.3, 1.8)))) / 255


def _in_coarse_pixels(rng: Rng, scene: Array) -> Array:
    coarse = scene.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))
    return coarse.repeat(2, axis=0).repeat(2, axis=1)


def _with_fault(name: str, fault: Callable[[Rng, Array], Array]) -> Task:
    plain = PLAIN[name]

    def draw(rng: Rng, label: int, split: str) -> Array:
        return fault(rng, np.clip(plain.draw(rng, label, split), 0, 1))

    return replace(plain, draw=draw)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PLAIN["mnist"],
        Task("clothes", tuple(GARMENTS[label] for label in CLOTHES), _ABOUT_CLOTHES, _clothes),
        _with_fault("emoji", _in_haze),
        _with_fault("digits", _at_night),
        _with_fault("letters", _through_blinds),
        _with_fault("shapes", _out_of_focus),
        _with_fault("counting", _in_haze),
        _with_fault("textures", _in_coarse_pixels),
    )
}
