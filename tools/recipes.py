"""Every number that decides what an embedded pool becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_bench_intervmerge.tinyclip.pools import IMAGES, MINI, TINY
from fusion_bench_intervmerge.tinyclip.tasks import Array


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


@dataclass(frozen=True)
class Stage:
    """One training run: AdamW, a warm-up, then a cosine down to zero.

    Attributes:
        warmup: its share of the steps.
        keep: weight of the cosine distance between an expert's features and the pretrained
            encoder's, on images of the other tasks.
        keep_batch_size: how many of those a step takes.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup: float = 0.3
    keep: float = 0.0
    keep_batch_size: int = 0


@dataclass(frozen=True)
class Pictures:
    """How many images of each kind mini's pre-training sees; the first three are of every task.

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


@dataclass(frozen=True)
class Recipe:
    """How large the encoders are, and how they are trained.

    The numbers were chosen so that the eight experts know their tasks and that averaging them
    costs what it costs full-sized CLIPs. No merging or repair method had a say in them.

    Attributes:
        images: split -> images per task.
        pictures: what pre-training sees; None: the train splits of the tasks.
    """

    images: dict[str, int] = field(default_factory=IMAGES.copy)
    width: int = 64
    blocks: int = 6
    text_blocks: int = 2
    head_width: int = 16
    patch_size: int = 8
    features: int = 64
    pretraining: Stage = Stage(steps=450, batch_size=128, lr=2e-3)
    finetuning: Stage = Stage(steps=300, batch_size=64, lr=1e-3)
    pictures: Pictures | None = None


RECIPES = {
    TINY.name: Recipe(),
    MINI.name: Recipe(
        blocks=12,
        pretraining=Stage(steps=5000, batch_size=64, lr=1e-3, warmup=0.1),
        finetuning=Stage(400, 48, 7e-4, 0.0, warmup=0.1, keep=2.0, keep_batch_size=24),
        pictures=Pictures(),
    ),
}
