"""Settings of a training, the optimizer that they name, and the published one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from ..config import HOST_KEYS, ConfigError, Flag, Json, shown, whole
from ..data import RepairSettings

MAX_RATE = 1000  # beyond it no learning rate is meant
OPTIMIZER = {"_target_": "torch.optim.Adam", "lr": 3e-3}

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def make_optimizer(
    settings: Json | MakeOptimizer, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that settings name, or make if they are a function of the parameters.

    Raises:
        ConfigError: ``_target_`` is not the path of a torch optimizer, or that optimizer refuses an
            argument.
    """
    if not isinstance(settings, dict):
        return settings(parameters)
    arguments = {key: value for key, value in settings.items() if key not in HOST_KEYS}
    for key, value in arguments.items():  # not every optimizer refuses them
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not isfinite(number) for number in numbers):
            raise ConfigError(f"optimizer.{key}", shown(value), "finite numbers")
    rate = arguments.get("lr", 1)
    if isinstance(rate, (int, float)) and (rate == 0 or rate > MAX_RATE):
        raise ConfigError("optimizer.lr", shown(rate), f"a number in (0, {MAX_RATE}]")
    try:
        cls = resolve_name(arguments.pop("_target_", ""))
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise TypeError(f"{shown(settings.get('_target_'))} is not a torch optimizer")
        if cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            # one kernel for hundreds of small tensors
            arguments = {"fused": True} | arguments
        return cls(parameters, **arguments)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError("optimizer", reason, "{_target_: torch.optim.Adam, lr: 0.003}") from None


class TripleStepAdam(torch.optim.Adam):
    """Adam that takes each of its steps three times, on the same gradients.

    The published code lists every parameter three times in one group, and Adam updates moments,
    step count and parameter at each mention.
    """

    def step(self, closure: Any = None) -> Any:
        """Three steps of Adam; ``closure`` is evaluated once, before the first."""
        loss = super().step(closure)
        for _ in range(2):
            super().step()
        return loss


class DistillSettings(RepairSettings):
    """What ``distill`` takes.

    Args:
        steps: steps per task; each shows every task one batch of its images. 0: no training.
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

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if isinstance(self.optimizer, dict):  # what torch refuses is refused before the merge
            make_optimizer(self.optimizer, [nn.Parameter(torch.zeros(1))])
        return self
