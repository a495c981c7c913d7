"""Task vectors: what fine-tuning changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class TaskVector:
    """tau = theta - theta0, a tensor a parameter (Task Arithmetic, arXiv 2212.04089, section 2).

    Attributes:
        tensors: by the parameter's name, in ``named_parameters()`` order.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def between(cls, expert: Mapping[str, Tensor], pretrained: Mapping[str, Tensor]) -> TaskVector:
        """What leads from ``pretrained`` to ``expert``.

        Raises:
            ConfigError: the two differ in a tensor's name or shape.
        """
        shapes = [{name: t.shape for name, t in of.items()} for of in (expert, pretrained)]
        if shapes[0] != shapes[1]:
            raise ConfigError("modelpool", "an expert and the pretrained encoder differ in shape")
        return cls({name: expert[name].detach() - t for name, t in pretrained.items()})

    def __add__(self, other: TaskVector) -> TaskVector:
        return TaskVector({name: t + other.tensors[name] for name, t in self.tensors.items()})

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: t * factor for name, t in self.tensors.items()})

    __rmul__ = __mul__

    def added_to(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """theta0 + tau."""
        return {name: weights[name] + t for name, t in self.tensors.items()}

    def trim(self, keep: float) -> TaskVector:
        """Keep the share ``keep`` of the entries that are largest in magnitude; the others are 0.

        The first step of Ties-Merging (arXiv 2306.01708, section 4).
        """
        flat = torch.cat([tensor.flatten() for tensor in self.tensors.values()]).abs()
        threshold = flat.kthvalue(max(1, flat.numel() - int(keep * flat.numel()))).values
        return TaskVector(
            {name: torch.where(t.abs() >= threshold, t, 0.0) for name, t in self.tensors.items()}
        )
