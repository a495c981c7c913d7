"""What ``clip-vit-mini_TA8`` is pre-trained on.

Real CLIPs saw most things, but rarely as a task shows them, and rarely under a task's own names. So
it is here. Pre-training shows every class in dark ink on a light ground, as an outline, or as a
silhouette (emoji on paper of any colour) under the names that the zero-shot heads use; in the plain
look of its source it shows most images under German names, which tell the classes apart but are in
no head, and a few under the heads' own. Besides there are things that are in no task: some thousand
emoji under their Unicode names, the rest of the alphabet, and three other tasks of the tiny pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from recipes import Collection, Pictures

from fusion_bench_intervmerge.tinyclip import tasks as tiny
from fusion_bench_intervmerge.tinyclip.material import Emoji, emoji
from fusion_bench_intervmerge.tinyclip.mini import PLAIN, choose, emoji_by_class, on_paper, scan
from fusion_bench_intervmerge.tinyclip.tasks import SIZE, Array, Draw, Rng, Task

LETTERS = tiny.LETTERS.split(", ")
DIGITS = tiny.TASKS["digits"].classnames


def _in_ink(coverage: Callable[[Rng, int, str], Array]) -> Draw:
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
    return on_paper(rng, choose(rng, emoji_by_class(split)[label]).picture)


def _coarse_scan(rng: Rng, label: int, split: str) -> Array:
    return tiny.placed_scan(rng, tiny.digit_scans()[split][label])


OTHER_LOOKS: dict[str, Draw] = {
    "mnist": _in_ink(lambda rng, label, split: scan(rng, "mnist", label, split)),
    "fashion_mnist": _in_ink(lambda rng, label, split: scan(rng, "fashion_mnist", label, split)),
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


def collections(seed: int, count: Pictures) -> Iterator[Collection]:
    """Everything that pre-training sees, of the train splits alone."""

    def drawn(task: Task, size: int, first: int = 0) -> tuple[Array, Array]:
        images, labels = task.images(seed, "train", size)
        return images[first:], labels[first:]

    for task in PLAIN.values():
        other = Task(f"{task.name} in other looks", task.classnames, (), OTHER_LOOKS[task.name])
        parts = drawn(other, count.other_looks), drawn(task, count.named)
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        yield Collection(images, labels, task.all_captions())
        caption, words = GERMAN[task.name]
        names = [[caption.format(word), word] for word in words.split()]
        yield Collection(*drawn(task, count.named + count.german, count.named), names)
    for task, size in (
        *((tiny.TASKS[name], count.other_tasks) for name in ("positions", "colours", "gratings")),
        (_named_emoji(), count.emoji),
        (_alphabet(), count.alphabet),
    ):
        yield Collection(*drawn(task, size), task.all_captions())


def _named_emoji() -> Task:
    """Every emoji of the train split under its own name and group."""
    named: dict[str, list[Emoji]] = {}
    for one in emoji():
        if one.split == "train":
            words = " ".join(re.findall("[a-z]+", one.name.lower())[:6])
            named.setdefault(words, []).append(one)
    pictures = list(named.values())

    def draw(rng: Rng, label: int, split: str) -> Array:
        return on_paper(rng, choose(rng, pictures[label]).picture)

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
