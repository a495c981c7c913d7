"""Settings of a training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..images import RepairSettings
from ..schema import Json
from ..settings import Flag, whole
from .optimizer import OPTIMIZER, MakeOptimizer


class DistillSettings(RepairSettings):
    """What ``distill`` takes.

    Args:
        steps: steps a task; each shows every task one batch of its images. 0: no training.
        loss: ``output``, the mean L1 of the image features, or ``blocks``, which adds that of every
            block's token mean (SurgeryV2).
        optimizer: config of any torch optimizer (in Python also a function of the parameters). The
            published optimizer lists every parameter three times, so that each of its steps at 1e-3
            is three steps of Adam; hence 3e-3.
        save_every: steps between two states of a run that may be stopped.
        compile: compile the encoder's blocks for the training; it takes about half a minute, and
            pays in long runs of wide encoders.
    """

    steps: Annotated[int, whole(0, 10**7)] = 1000
    loss: Literal["output", "blocks"] = "output"
    optimizer: Annotated[Json | MakeOptimizer, Field(description=f"a mapping like {OPTIMIZER}")] = (
        Field(default=OPTIMIZER)
    )
    save_every: Annotated[int, whole(1, 10**7)] = 100
    compile: Flag = False
