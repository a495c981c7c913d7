"""What ``clip-vit-mini_TA8`` is made of: its eight tasks, and what its encoder is pre-trained on.

Real CLIPs saw most things, but rarely as a task shows them, and rarely under a task's own names. So
it is here. Pre-training shows every class in dark ink on a light ground, as an outline, or as a
silhouette (emoji on paper of any colour) under the names that the zero-shot heads use; in the plain
look of its source it shows most images under German names, which tell the classes apart but are in
no head, and a few under the heads' own. The tasks themselves show the plain look (MNIST, clothes),
or it with a fault that pre-training never sees: haze, sensor noise, blinds, a lens out of focus,
coarse pixels. The features are there, then, and not quite where the heads are. Besides there are
things that are in no task: some thousand emoji under their Unicode names, the rest of the alphabet,
and three other tasks of the tiny pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from . import tasks as tiny
from .material import Emoji, emoji, scans
from .recipe import Gentle, Paced, Recipe, Stage
from .tasks import SIZE, Array, Draw, Rng, Task

GROUPS = {
    "face": r"face-",
    "person": r"person(-role|-activity|-gesture|-fantasy|-sport)?$",
    "hand": r"hand",
    "animal": r"animal-",
    "flag": r"country-flag$",
    "sign": r"(alphanum|av-symbol|arrow|zodiac|keycap)$",
}
"""The classes of the task ``emoji``, and the Unicode groups of each."""


# --- the plain looks ---------------------------------------------------------------


def _mnist(rng: Rng, label: int, split: str) -> Array:
    return _bare(rng, _scan(rng, "mnist", label, split))


def _fashion(rng: Rng, label: int, split: str) -> Array:
    return _bare(rng, _scan(rng, "fashion_mnist", label, split))


def _faded_emoji(rng: Rng, label: int, split: str) -> Array:
    """As on an old print: yellowed, with little contrast."""
    scene = _on_paper(rng, _choose(rng, _of_group(split)[label]).picture, light=0.85)
    gray, colour = scene.mean(axis=2, keepdims=True), rng.uniform(0.5, 0.8)
    faded = 0.25 + 0.5 * (gray + colour * (scene - gray)) * (1.1, 1.0, 0.8)
    return faded + rng.uniform(0.01, 0.05) * rng.normal(size=scene.shape)


def _task(name: str, classnames: str, prompts: tuple[str, ...], draw: Draw) -> Task:
    return Task(name, tuple(classnames.split(", ")), prompts, draw)


# Class names and prompts of the first two are FusionBench's own.
PLAIN: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "mnist",
            "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
            ('a photo of the number: "{}".',),
            _mnist,
        ),
        _task(
            "fashion_mnist",
            "T - shirt / top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, "
            "Ankle boot",
            ("a photo of a {}.", "a photo of the {}."),
            _fashion,
        ),
        _task("emoji", ", ".join(GROUPS), ("a picture of a {}", "a small {} symbol"), _faded_emoji),
        *(tiny.TASKS[name] for name in ("digits", "letters", "shapes", "counting", "textures")),
    )
}


# --- the tasks, as pre-training never shows them -------------------------------------------------


def _seen(look: Callable[[Rng, Array], Array], name: str) -> Task:
    """A plain task under another look, ``(rng, scene) -> scene``."""
    plain = PLAIN[name]

    def draw(rng: Rng, label: int, split: str) -> Array:
        return look(rng, np.clip(plain.draw(rng, label, split), 0, 1))

    return replace(plain, draw=draw)


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


def _clothes() -> Task:
    """Fashion-MNIST without the garments that are hard to tell apart at this size."""
    fashion = PLAIN["fashion_mnist"]
    kept = (1, 2, 3, 5, 7, 8, 9)

    def draw(rng: Rng, label: int, split: str) -> Array:
        return fashion.draw(rng, kept[label], split)

    classnames = tuple(fashion.classnames[label] for label in kept)
    return Task("clothes", classnames, fashion.prompts, draw)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PLAIN["mnist"],
        _clothes(),
        _seen(_in_haze, "emoji"),
        _seen(_at_night, "digits"),
        _seen(_through_blinds, "letters"),
        _seen(_out_of_focus, "shapes"),
        _seen(_in_haze, "counting"),
        _seen(_in_coarse_pixels, "textures"),
    )
}


# --- the plain tasks in other looks --------------------------------------------------------------


LETTERS = tiny.LETTERS.split(", ")
DIGITS = tiny.TASKS["digits"].classnames


def _in_ink(coverage) -> Draw:
    """``coverage(rng, label, split)``, (SIZE, SIZE), in dark ink on a light ground.

    A fifth is an outline, a fifth a silhouette.
    """

    def draw(rng: Rng, label: int, split: str) -> Array:
        laid, form = coverage(rng, label, split), rng.random()
        if form < 0.2:
            laid = np.clip(3 * np.hypot(*np.gradient(laid)), 0, 1)
        elif form < 0.4:
            laid = (laid > 0.3) * 1.0
        ground = np.broadcast_to(rng.uniform(0.65, 1, 3), (SIZE, SIZE, 3))
        scene = tiny.paint(ground, laid, rng.uniform(0, 0.45, 3))
        return scene + rng.uniform(0, 0.03) * rng.normal(size=scene.shape)

    return draw


def _emoji(rng: Rng, label: int, split: str) -> Array:
    return _on_paper(rng, _choose(rng, _of_group(split)[label]).picture)


def _coarse_scan(rng: Rng, label: int, split: str) -> Array:
    return tiny.placed_scan(rng, tiny.digit_scans()[split][label])


OTHER_LOOKS: dict[str, Draw] = {
    "mnist": _in_ink(lambda rng, label, split: _scan(rng, "mnist", label, split)),
    "fashion_mnist": _in_ink(lambda rng, label, split: _scan(rng, "fashion_mnist", label, split)),
    "emoji": _emoji,
    "digits": _in_ink(_coarse_scan),
    "letters": _in_ink(lambda rng, label, split: tiny.letter(rng, LETTERS[label])),
    "shapes": _in_ink(lambda rng, label, split: tiny.outline(rng, label)),
    "counting": _in_ink(lambda rng, label, split: tiny.dots(rng, label + 1)),
    "textures": _in_ink(lambda rng, label, split: tiny.grain(rng, label)),
}

NUMBERS = "null eins zwei drei vier fuenf sechs sieben acht neun"
GERMAN = {
    "mnist": ("eine geschriebene {}", NUMBERS),
    "fashion_mnist": (
        "ein Foto {}",
        "Unterhemd Hose Pulli Kleid Mantel Sandale Hemd Turnschuh Tasche Stiefel",
    ),
    "emoji": ("ein Bild {}", "Gesicht Mensch Hand Tier Flagge Zeichen"),
    "digits": ("die Ziffer {}", NUMBERS),
    "letters": (
        "der Buchstabe {}",
        "Anton Berta Caesar Emil Heinrich Kaufmann Martha Richard Samuel Theodor",
    ),
    "shapes": ("eine Figur {}", "Kreis Quadrat Dreieck Raute Reif Kreuz Stern Sichel"),
    "counting": ("{} Punkte", "eins zwei drei vier fuenf sechs"),
    "textures": (
        "eine Oberflaeche {}",
        "weisses rosa braunes blaues grobes mittleres feines feinstes",
    ),
}
"""Task -> a caption and the classes' names in German, spelled without umlauts."""


# --- pre-training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """How many images of each kind pre-training sees; the first three are of every task.

    Attributes:
        other_looks: in ink, under the heads' names.
        named: in the plain look, under the heads' names.
        german: in the plain look, under German names.
        emoji: under their Unicode names.
        alphabet: printed characters that are in no task.
        other_tasks: of each of the tiny pool's tasks that are not in this one.
    """

    other_looks: int = 1800
    named: int = 80
    german: int = 1600
    emoji: int = 4000
    alphabet: int = 2000
    other_tasks: int = 1000


PRETRAINING = Paced(steps=5000, batch_size=64, lr=1e-3)
FINETUNING = Gentle(steps=400, batch_size=48, lr=7e-4, keep=2.0, keep_batch_size=24)


@dataclass(frozen=True)
class MiniRecipe(Recipe):
    """The recipe of ``clip-vit-mini_TA8``; ``benchmarks/pools.md`` tells how it was chosen."""

    blocks: int = 12
    pictures: Pictures = Pictures()
    pretraining: Stage = PRETRAINING
    finetuning: Stage = FINETUNING


@dataclass(frozen=True)
class Collection:
    """Images of some classes with the captions that are true of each class.

    Attributes:
        images, labels: uint8 (n, SIZE, SIZE, 3) and int64 (n,).
        captions: per label, one or more.
    """

    images: Array
    labels: Array
    captions: list[list[str]]


def collections(recipe: MiniRecipe) -> Iterator[Collection]:
    """Everything that pre-training sees, of the train splits alone."""
    count = recipe.pictures
    for task in PLAIN.values():
        names = [task.captions(label) for label in range(len(task.classnames))]
        other = Task(f"{task.name} in other looks", task.classnames, (), OTHER_LOOKS[task.name])
        (images, labels), (more, their) = (
            other.images(recipe.seed, "train", count.other_looks),
            task.images(recipe.seed, "train", count.named),
        )
        yield Collection(np.concatenate([images, more]), np.concatenate([labels, their]), names)
        caption, words = GERMAN[task.name]
        images, labels = task.images(recipe.seed, "train", count.named + count.german)
        names = [[caption.format(word), word] for word in words.split()]
        yield Collection(images[count.named :], labels[count.named :], names)
    for name in ("positions", "colours", "gratings"):
        task = tiny.TASKS[name]
        images, labels = task.images(recipe.seed, "train", count.other_tasks)
        captions = [task.captions(label) for label in range(len(task.classnames))]
        yield Collection(images, labels, captions)
    for task in (_named_emoji(), _alphabet()):
        size = count.emoji if task.name == "named emoji" else count.alphabet
        images, labels = task.images(recipe.seed, "train", size)
        captions = [task.captions(label) for label in range(len(task.classnames))]
        yield Collection(images, labels, captions)


def _named_emoji() -> Task:
    """Every emoji of the train split under its own name and group."""
    named: dict[str, list[Emoji]] = {}
    for one in emoji():
        if one.split == "train":
            words = " ".join(re.findall("[a-z]+", one.name.lower())[:6])
            named.setdefault(words, []).append(one)
    pictures = list(named.values())

    def draw(rng: Rng, label: int, split: str) -> Array:
        return _on_paper(rng, _choose(rng, pictures[label]).picture)

    return Task("named emoji", tuple(named), ("a picture of {}", "a drawing of {}"), draw)


def _alphabet() -> Task:
    """Printed characters other than the letters of the task ``letters``, on light and dark."""
    names = {c.upper(): f"letter {c}" for c in "abcdefghijklmnopqrstuvwxyz"}
    names |= {c: f"small letter {c}" for c in "abdefghijklmnpqrtuy"}
    names |= {str(i): f"digit {name}" for i, name in enumerate(DIGITS)}
    for letter in LETTERS:
        del names[letter]
    characters = list(names)
    in_ink = _in_ink(lambda rng, label, split: tiny.letter(rng, characters[label]))

    def draw(rng: Rng, label: int, split: str) -> Array:
        if rng.random() < 0.6:
            return in_ink(rng, label, split)
        ground, ink = tiny.ground_and_ink(rng)
        return tiny.photograph(rng, tiny.paint(ground, tiny.letter(rng, characters[label]), ink))

    return Task("alphabet", tuple(names.values()), ("the {} in print", "a printed {}"), draw)


# --- parts of pictures ---------------------------------------------------------------------------


def _scan(rng: Rng, name: str, label: int, split: str) -> Array:
    """A digit or a garment from its source, of a random size at a random place, from 0 to 1."""
    return tiny.placed_scan(rng, scans(name)[split][label])


def _bare(rng: Rng, coverage: Array) -> Array:
    """White on black, as the source has it."""
    scene = np.repeat(coverage[..., None], 3, axis=2)
    return scene + rng.uniform(0, 0.03) * rng.normal(size=scene.shape)


def _on_paper(rng: Rng, picture: Array, light: float = 0.0) -> Array:
    """A picture with transparency, turned and moved a little, on paper at least that light."""
    side = int(rng.integers(25, 33))
    turned = Image.fromarray(picture).rotate(rng.uniform(-12, 12), Image.BICUBIC)
    turned = turned.resize((side, side), Image.BICUBIC)
    paper = tuple(int(v) for v in rng.integers(int(255 * light), 256, 3))
    page = Image.new("RGBA", (SIZE, SIZE), (*paper, 255))
    page.alpha_composite(turned, tuple(int(v) for v in rng.integers(0, SIZE - side + 1, 2)))
    return np.asarray(page)[..., :3] / 255


def _choose(rng: Rng, some):
    return some[rng.integers(len(some))]


@cache
def _of_group(split: str) -> list[list[Emoji]]:
    mine = [one for one in emoji() if one.split == split and one.tone is None]
    return [[one for one in mine if re.match(group, one.group)] for group in GROUPS.values()]
