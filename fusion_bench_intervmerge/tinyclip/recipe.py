"""Every number that decides what an embedded pool becomes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One training run: AdamW, a warm-up, then a cosine down to zero."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Paced(Stage):
    """A stage with a warm-up of its own.

    Attributes:
        warmup: its share of the steps; a :class:`Stage` warms up for three tenths.
    """

    warmup: float = 0.1


@dataclass(frozen=True)
class Gentle(Paced):
    """Fine-tuning that leaves the other tasks' features where they are.

    Attributes:
        keep: weight of the cosine distance between an expert's features and the pretrained
            encoder's, on images of the other tasks.
        keep_batch_size: how many of those a step takes.
    """

    weight_decay: float = 0.0
    keep: float = 0.0
    keep_batch_size: int = 0


@dataclass(frozen=True)
class Recipe:
    """What to draw, how large the encoders are, and how they are trained.

    The numbers were chosen so that the eight experts know their tasks and that averaging them
    costs what it costs full-sized CLIPs. No merging or repair method had a say in them.

    Attributes:
        revision: to be raised when a drawing or a training rule changes, so that pools which were
            built by the old one are not taken for today's.
    """

    seed: int = 0
    revision: int = 1

    train: int = 2400
    validation: int = 300
    test: int = 480

    width: int = 64
    blocks: int = 6
    text_blocks: int = 2
    head_width: int = 16
    patch_size: int = 8
    features: int = 64
    context: int = 16

    pretraining: Stage = Stage(steps=450, batch_size=128, lr=2e-3)
    finetuning: Stage = Stage(steps=300, batch_size=64, lr=1e-3)

    def sizes(self) -> dict[str, int]:
        """Images per task in each split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}
