"""What a task is, and the eight of ``clip-vit-tiny_TA8``: what is drawn, and how it is called.

One task is one function ``draw(rng, label, split) -> image`` under the :func:`task` decorator.
Adding a task is adding such a function; nothing else knows how many there are.

All but the digits are drawn from nothing. Most share one look (flat ink on a shaded ground, under
uneven light, with sensor noise), so that a letter, a shape and a colour ask for different readings
of the same kind of picture: that is what makes their experts get into each other's way.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
"""Width and height of every image, in pixels."""

SPLITS = ("train", "validation", "test")

REVISION = 1
"""To be raised when a drawing changes, so that images drawn before are not taken for today's."""

Array = np.ndarray
Rng = np.random.Generator
Draw = Callable[[Rng, int, str], Array]
Spectrum = Callable[[Array, Rng], Array]

# Pixel centres, x to the right and y downwards, both from -1 to 1.
Y, X = (2 * np.mgrid[:SIZE, :SIZE] + 1) / SIZE - 1


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: how model pool, task pool and FusionBench's table of class names call it.
        classnames: one name per label.
        prompts: captions with a ``{}`` for the class name; several make one zero-shot head.
        draw: ``(rng, label, split) -> image``, shape (SIZE, SIZE, 3), values about 0 to 1. Only
            real material needs ``split``: no source image may serve in two of them.
    """

    name: str
    classnames: tuple[str, ...]
    prompts: tuple[str, ...]
    draw: Draw

    @property
    def templates(self) -> list[Callable[[str], str]]:
        """The prompts as FusionBench wants them: functions from class name to caption."""
        return [prompt.format for prompt in self.prompts]

    def captions(self, label: int) -> list[str]:
        """Every caption that describes an image of class ``label``."""
        return [prompt.format(self.classnames[label]) for prompt in self.prompts]

    def all_captions(self) -> list[list[str]]:
        """The captions of each class."""
        return [self.captions(label) for label in range(len(self.classnames))]

    def images(self, seed: int, split: str, count: int) -> tuple[Array, Array]:
        """The first ``count`` images of a split; image i depends on (seed, task, split, i) alone.

        Returns:
            images, uint8 of shape (count, SIZE, SIZE, 3), and labels, int64 of shape (count,),
            which go round the classes so that any stretch of a split is balanced.
        """
        source = [seed, zlib.crc32(self.name.encode()), SPLITS.index(split)]
        labels = np.arange(count) % len(self.classnames)
        images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
        for i, label in enumerate(labels):
            picture = self.draw(np.random.default_rng([*source, i]), int(label), split)
            images[i] = np.clip(picture * 255, 0, 255)
        return images, labels


TASKS: dict[str, Task] = {}


def task(classnames: str, *prompts: str) -> Callable[[Draw], Draw]:
    """Registers a drawing function as a task of the function's name.

    Args:
        classnames: the names of labels 0, 1, ..., separated by commas.
        prompts: captions with a ``{}`` for the class name.
    """

    def register(draw: Draw) -> Draw:
        names = tuple(name.strip() for name in classnames.split(","))
        TASKS[draw.__name__] = Task(draw.__name__, names, prompts, draw)
        return draw

    return register


# --- the tasks -----------------------------------------------------------------------------------


@task(
    "zero, one, two, three, four, five, six, seven, eight, nine",
    "a photo of the digit {}",
    "a handwritten {}",
)
def digits(rng: Rng, label: int, split: str) -> Array:
    """Handwritten digits, scikit-learn's 8 x 8 scans: the one task with real images."""
    coverage = placed_scan(rng, digit_scans()[split][label])
    chalk = rng.uniform(0.8, 1, 3)
    return photograph(rng, paint(_shaded(rng), coverage, chalk), noise=0.05)


LETTERS = "A, B, C, E, H, K, M, R, S, T"


@task(LETTERS, "a photo of the letter {}", "a printed {}")
def letters(rng: Rng, label: int, split: str) -> Array:
    """Capitals in matplotlib's DejaVu faces, turned, moved and scaled."""
    coverage = letter(rng, LETTERS.split(", ")[label])
    ground, ink = ground_and_ink(rng)
    return photograph(rng, paint(ground, coverage, ink))


@task(
    "circle, square, triangle, diamond, ring, cross, star, crescent",
    "a photo of a {}",
    "a drawing of a {} shape",
)
def shapes(rng: Rng, label: int, split: str) -> Array:
    """One filled outline."""
    ground, ink = ground_and_ink(rng)
    return photograph(rng, paint(ground, outline(rng, label), ink))


@task("one, two, three, four, five, six", "a photo of {} dots", "{} dots on a sheet")
def counting(rng: Rng, label: int, split: str) -> Array:
    """Dots that do not touch, of different sizes."""
    ground, ink = ground_and_ink(rng)
    return photograph(rng, paint(ground, dots(rng, label + 1), ink))


@task(
    "left of, right of, above, below, inside, around",
    "a photo of a red disc {} a blue square",
    "the red disc is {} the blue square",
)
def positions(rng: Rng, label: int, split: str) -> Array:
    """Where a disc lies, seen from a square."""
    size = rng.uniform(0.26, 0.34)
    step, disc, square = {
        0: ((-1, 0), size, size),
        1: ((1, 0), size, size),
        2: ((0, -1), size, size),
        3: ((0, 1), size, size),
        4: ((0, 0), size, 2 * size),
        5: ((0, 0), 2.2 * size, size),
    }[label]
    middle = rng.uniform(-0.2, 0.2, 2)
    away = rng.uniform(0.35, 0.5) * np.array(step) + rng.uniform(-0.2, 0.2) * np.array(step)[::-1]
    (dx, dy), (sx, sy) = middle + away, middle - away
    red, blue = (0.95, 0.25, 0.25), (0.3, 0.45, 1.0)
    figures = [
        (disc, np.hypot(X - dx, Y - dy), red),
        (square, np.maximum(abs(X - sx), abs(Y - sy)), blue),
    ]
    scene = _shaded(rng)
    for radius, distance, colour in sorted(figures, key=lambda f: -f[0]):  # the smaller on top
        scene = paint(scene, _coverage(distance - radius), colour + rng.normal(0, 0.05, 3))
    return photograph(rng, scene)


@task(
    "red, orange, yellow, green, cyan, blue, purple, pink, brown, gray",
    "a photo of a {} thing",
    "the larger thing is {}",
)
def colours(rng: Rng, label: int, split: str) -> Array:
    """The colour of the larger of two figures."""
    scene = _shaded(rng)
    other = (label + rng.integers(1, len(HUES))) % len(HUES)
    for hue, radius in ((label, (0.5, 0.65)), (other, (0.25, 0.32))):
        outline = OUTLINES[rng.integers(len(OUTLINES))]
        distance = outline(*_placed(rng, radius, turn=0.25))
        scene = paint(scene, _coverage(distance), _dye(rng, hue))
    return photograph(rng, scene)


@task(
    "0, 15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165",
    "a grating at {} degrees",
    "stripes turned by {} degrees",
)
def gratings(rng: Rng, label: int, split: str) -> Array:
    """The angle of the stronger of two crossing gratings."""
    turn = label + rng.integers(2, 11)
    waves = _wave(rng, label) + rng.uniform(0.3, 0.6) * _wave(rng, turn)
    ground, ink = ground_and_ink(rng)
    return photograph(rng, paint(ground, 0.5 + rng.uniform(0.1, 0.3) * waves, ink))


@task(
    "white, pink, brown, blue, coarse, medium, fine, finest",
    "a texture of {} noise",
    "a surface with a {} grain",
)
def textures(rng: Rng, label: int, split: str) -> Array:
    """Noise with a given spectrum: four power laws, four bands."""
    coverage = grain(rng, label)
    ground, ink = ground_and_ink(rng)
    return photograph(rng, paint(ground, coverage, ink), noise=0.05)


# --- what the tasks lay on the ground: coverage, (SIZE, SIZE) from 0 to 1 -------------------------


def placed_scan(rng: Rng, scans: Array) -> Array:
    """One of some square scans, uint8 (n, side, side), of a random size at a random place."""
    side = int(rng.integers(27, 32))
    scan = Image.fromarray(scans[rng.integers(len(scans))])
    page = Image.new("L", (SIZE, SIZE))
    left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
    page.paste(scan.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return np.asarray(page) / 255


def letter(rng: Rng, character: str) -> Array:
    """A character in one of matplotlib's DejaVu faces, turned, moved and scaled."""
    face = FACES[rng.integers(len(FACES))]
    page = Image.new("L", (SIZE, SIZE))
    place = tuple(SIZE / 2 + rng.uniform(-2, 2, 2))
    font = _font(face, int(rng.integers(23, 29)))
    ImageDraw.Draw(page).text(place, character, 255, font, anchor="mm")
    return np.asarray(page.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)) / 255


def outline(rng: Rng, label: int) -> Array:
    """A filled shape of that label."""
    return _coverage(OUTLINES[label](*_placed(rng, (0.5, 0.75), turn=0.25)))


def dots(rng: Rng, count: int) -> Array:
    """Discs of different sizes that do not touch."""
    discs: list[tuple[float, float, float]] = []
    while len(discs) < count:
        radius, (x, y) = rng.uniform(0.14, 0.2), rng.uniform(-0.78, 0.78, 2)
        if all(np.hypot(x - u, y - v) > radius + r + 0.12 for u, v, r in discs):
            discs.append((x, y, radius))
    return _coverage(np.min([np.hypot(X - x, Y - y) - r for x, y, r in discs], axis=0))


def grain(rng: Rng, label: int) -> Array:
    """Noise with the spectrum of that label."""
    spectrum = np.fft.rfft2(rng.normal(size=(SIZE, SIZE))) * SPECTRA[label](_frequency(), rng)
    noise = np.fft.irfft2(spectrum, (SIZE, SIZE))
    return np.clip(0.5 + rng.uniform(0.1, 0.25) * (noise - noise.mean()) / noise.std(), 0, 1)


# --- ink, ground and light -----------------------------------------------------------------------


def _shaded(rng: Rng) -> Array:
    """A dim ground whose colour changes slowly from one side to the other, (SIZE, SIZE, 3)."""
    one, change = rng.uniform(0.0, 0.35, 3), rng.uniform(-0.15, 0.15, 3)
    angle = rng.uniform(0, 2 * np.pi)
    along = 0.5 * (X * np.cos(angle) + Y * np.sin(angle))
    return np.clip(one + along[..., None] * change, 0, 1)


def _bright(rng: Rng) -> Array:
    """An ink that can be told from every ground, (3,)."""
    return rng.uniform(0.55, 1.0, 3)


def ground_and_ink(rng: Rng) -> tuple[Array, Array]:
    return _shaded(rng), _bright(rng)


def paint(ground: Array, coverage: Array, ink: Array) -> Array:
    """Lays ink over the ground where coverage, (SIZE, SIZE) from 0 to 1, says so."""
    return ground + coverage[..., None] * (ink - ground)


def photograph(rng: Rng, scene: Array, noise: float = 0.08) -> Array:
    """The scene under a brighter or darker light, with up to ``noise`` of sensor noise."""
    light = rng.uniform(0.85, 1.1)
    return light * scene + rng.uniform(0.02, noise) * rng.normal(size=scene.shape)


# --- outlines: signed distances, negative inside -------------------------------------------------


def _coverage(distance: Array) -> Array:
    """How much of each pixel lies inside: an edge one pixel wide, so nothing is jagged."""
    return np.clip(0.5 - distance * SIZE / 2, 0, 1)


def _placed(rng: Rng, radius: tuple[float, float], turn: float) -> tuple[Array, Array, float]:
    """A random frame to draw in: x and y about its centre, turned by up to ``turn`` radians."""
    size, angle = rng.uniform(*radius), rng.uniform(-turn, turn)
    dx, dy = rng.uniform(-1, 1, 2) * (0.95 - size)
    x, y = X - dx, Y - dy
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin, size


def _cross(x: Array, y: Array, r: float) -> Array:
    wide, narrow = np.maximum(abs(x), abs(y)) - r, np.minimum(abs(x), abs(y)) - 0.3 * r
    return np.maximum(wide, narrow)


OUTLINES: tuple[Callable[[Array, Array, float], Array], ...] = (
    lambda x, y, r: np.hypot(x, y) - r,  # circle
    lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,  # square
    lambda x, y, r: np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.5 * r,  # triangle
    lambda x, y, r: (abs(x) + 0.7 * abs(y)) * 0.82 - 0.7 * r,  # diamond
    lambda x, y, r: abs(np.hypot(x, y) - 0.78 * r) - 0.22 * r,  # ring
    _cross,
    lambda x, y, r: np.hypot(x, y) - r * (0.7 - 0.3 * np.cos(5 * np.arctan2(x, y))),  # star
    lambda x, y, r: np.maximum(
        np.hypot(x, y) - r, 0.75 * r - np.hypot(x - 0.55 * r, y)
    ),  # crescent
)


def _dye(rng: Rng, label: int) -> Array:
    """A shade of one of the ten named colours, (3,)."""
    hue, saturation, value = HUES[label] + rng.normal(size=3) * (7, 0.07, 0.07)
    shade = colorsys.hsv_to_rgb(hue % 360 / 360, *np.clip((saturation, value), 0, 1))
    return np.array(shade)


# Hue in degrees, saturation, value.
HUES = (
    *((0, 0.9, 0.9), (30, 0.95, 0.95), (56, 0.9, 0.95), (120, 0.85, 0.7), (180, 0.8, 0.9)),
    *((230, 0.85, 0.85), (280, 0.8, 0.7), (330, 0.45, 0.98), (25, 0.75, 0.45), (0, 0.05, 0.6)),
)


# --- stripes, spectra, faces, scans ---------------------------------------------------------------


def _wave(rng: Rng, twelfths: int) -> Array:
    """A plane wave of any width at about this many twelfths of a half turn, from -1 to 1."""
    angle = np.pi * (twelfths / 12 + rng.normal(0, 0.01))
    along = X * np.cos(angle) + Y * np.sin(angle)
    return np.sin(rng.uniform(6, 16) * along + rng.uniform(0, 2 * np.pi))


@cache
def _frequency() -> Array:
    """Cycles per image of each coefficient of ``rfft2``, never below 1."""
    rows, columns = np.fft.fftfreq(SIZE, 1 / SIZE), np.fft.rfftfreq(SIZE, 1 / SIZE)
    return np.maximum(np.hypot(rows[:, None], columns), 1)


def _power(exponent: float) -> Spectrum:
    return lambda frequency, rng: frequency ** (exponent + rng.normal(0, 0.1))


def _band(centre: float) -> Spectrum:
    def spectrum(frequency: Array, rng: Rng) -> Array:
        middle = centre * rng.uniform(0.85, 1.15)
        return np.exp(-(((frequency - middle) / (0.25 * middle)) ** 2))

    return spectrum


SPECTRA = (*map(_power, (0, -0.7, -1.5, 0.7)), *map(_band, (3, 5, 8, 12)))

FACES = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold", "Serif-Italic")


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    return ImageFont.truetype(f"{folder}/DejaVu{face}.ttf", size)


@cache
def digit_scans() -> dict[str, list[Array]]:
    """Split -> label -> scans of that digit, uint8 of shape (n, 8, 8); no scan is in two splits."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    # Neighbours in the file come from one hand, so that stretches, not single scans, are dealt out.
    turn = np.arange(len(scans.target)) // 20 % 8
    dealt = {"train": turn < 6, "validation": turn == 6, "test": turn == 7}
    pixels = np.minimum(scans.images * 16, 255).astype(np.uint8)
    return {
        split: [pixels[mine & (scans.target == label)] for label in range(10)]
        for split, mine in dealt.items()
    }
