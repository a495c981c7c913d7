"""FeatCal (arXiv 2605.13030), a rival: weights fitted to the experts' own, map by map.

All linear maps and layer norms of a block are replaced, from the first block to the last. With x
what a map reads in the calibrated encoder so far, u what it reads in a task's expert, and
m = mixture * u + (1 - mixture) * x, each map is the solution of::

    min over W   sum over tasks  mean over rows |W x - W_t m|^2 / |G_t|  +  ridge |W - A|^2
    A = W_pretrained + anchor (W_merged - W_pretrained),    G_t = mean over rows of x x'

|G_t| is the Frobenius norm. All maps of a block read what the block reads before any of them is
solved. A bias is then fitted to the means of the same rows, with the same penalty; a layer norm's
weight and bias to the experts' on the normalised x. In the last block patches count for 0.01,
except for keys and values, which the class token reads.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import lightning as L
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration import Streams, check_inputs, on_the_line, over_processes
from ..data import (
    Datasets,
    RepairSettings,
    RunFolder,
    computing_dtype,
    interruptible,
    progress_bar,
)
from ..encoders.base import ExpertLoaders, VisionTower

PATCHES = 0.01  # what a patch counts in the last block
TINY = 1e-8


class FeatCalSettings(RepairSettings):
    """What ``featcal`` takes; the defaults are the published code's.

    Args:
        ridge: how much is paid for leaving the anchor.
        anchor: where solutions are drawn to: 0 the pretrained weights, 1 the merged ones.
        mixture: the expert's share of the inputs that its own weights are applied to.
    """

    ridge: Annotated[float, Field(gt=0, description="a positive number")] = 0.05
    anchor: Annotated[float, Field(ge=0, le=10, description="a number, 0 to 10")] = 2.2
    mixture: Annotated[float, Field(ge=0, le=1, description="a number, 0 to 1")] = 0.25


@torch.no_grad()
def featcal(
    tower: VisionTower,
    pretrained: VisionTower,
    experts: ExpertLoaders,
    images: Datasets,
    settings: FeatCalSettings | None = None,
    *,
    fabric: L.Fabric | None = None,
    states: RunFolder | None = None,
    **keywords: object,
) -> VisionTower:
    """A copy of the merged encoder with FeatCal's weights; arguments as in ``calibrate``.

    Args:
        states: not used: nothing is kept of a run that is stopped.
    """
    settings = FeatCalSettings.of(settings, keywords)
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    check_inputs(tower, pretrained, experts, images)
    student = copy.deepcopy(tower).to(fabric.device).eval()
    expert = copy.deepcopy(student)
    with (
        interruptible("calibrating"),
        tempfile.TemporaryDirectory(prefix="experts-") as folder,
        student.in_dtype(computing_dtype(fabric)),
        expert.in_dtype(computing_dtype(fabric)),
        progress_bar(fabric, "calibrating", tower.num_blocks) as shown,
    ):
        streams = Streams(student, expert, experts, images, settings, fabric, Path(folder))
        streams.fill(folds=1)
        for block in range(tower.num_blocks):
            own = layers(student, block)
            fits = {
                name: (LinearFit if layer.linear else NormFit)(layer, fabric.device)
                for name, layer in own.items()
            }
            for task in streams.load_experts(block):
                for fit in fits.values():
                    fit.start()
                for position, (_, state, target) in enumerate(streams.batches(task)):
                    x, _ = read(student, block, state)
                    u, streams.targets[task][position] = read(expert, block, target)
                    for name, fit in fits.items():
                        weights = _weights(student, block, own[name])
                        mixed = settings.mixture * u[own[name].reads]
                        mixed += (1 - settings.mixture) * x[own[name].reads]
                        fit.add(x[own[name].reads], mixed, weights)
                theirs = layers(expert, block)
                for name, fit in fits.items():
                    fit.finish(theirs[name], fabric)
            first, merged = layers(pretrained, block), layers(tower, block)
            for name, fit in fits.items():
                line = (first[name], merged[name], settings.anchor, fabric.device)
                solution = fit.solve(*_anchor(*line), settings.ridge)
                own[name].weight.copy_(solution[0])
                own[name].bias.copy_(solution[1])
            for states_ in streams.states.values():
                states_.move(partial(student.run_block, block))
            shown.update()
        solved = {name: tensor.clone() for name, tensor in student.weights().items()}
    student.load_weights(solved)  # in their own type now
    return student.to(tower.device)


@dataclass
class Layer:
    """A linear map or a layer norm of a block.

    Attributes:
        weight, bias: views of the module's.
        reads: the name of its input, as ``read`` gives it.
        linear: whether it is a linear map.
        of_all_tokens: whether its output is of use for all tokens in the last block.
    """

    weight: Tensor
    bias: Tensor
    reads: str
    linear: bool = True
    of_all_tokens: bool = False


def layers(tower: VisionTower, block: int) -> dict[str, Layer]:
    """A block's linear maps and layer norms by name."""
    result = {}
    for name, module in tower.block(block).named_modules():
        if isinstance(module, nn.MultiheadAttention):  # the three projections in one tensor
            weight, bias, width = module.in_proj_weight.data, module.in_proj_bias.data, tower.width
            result[f"{name}.q"] = Layer(weight[:width], bias[:width], name)
            result[f"{name}.kv"] = Layer(weight[width:], bias[width:], name, of_all_tokens=True)
        elif isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            result[name] = Layer(
                module.weight.data,
                module.bias.data,
                name,
                linear=isinstance(module, nn.Linear),
                of_all_tokens=name.endswith(("k_proj", "v_proj", "key", "value")),
            )
    return result


def _anchor(
    pretrained: Layer, merged: Layer, position: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    weight = on_the_line(pretrained.weight, merged.weight, position)
    return weight.to(device), on_the_line(pretrained.bias, merged.bias, position).to(device)


def read(tower: VisionTower, block: int, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the layers of a block read, by name, and what leaves the block."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    with ExitStack() as hooks:
        for name, module in tower.block(block).named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)):
                hooks.callback(module.register_forward_pre_hook(partial(keep, name)).remove)
            if isinstance(module, nn.MultiheadAttention):  # which does not call it
                inputs[f"{name}.out_proj"] = tower.residual_maps(block)[0].reads(states)
        return inputs, tower.run_block(block, states)


def _weights(tower: VisionTower, block: int, layer: Layer) -> Tensor:
    """(num_tokens), what each token counts."""
    weights = torch.ones(tower.num_tokens, device=tower.device, dtype=torch.float64)
    if block == tower.num_blocks - 1 and not (layer.of_all_tokens or tower.reads_patches):
        weights[1:] = PATCHES
    return weights


class LinearFit:
    """A linear map's regression: ``start``, ``add``, ``finish`` for each task, then ``solve``."""

    def __init__(self, layer: Layer, device: torch.device):
        outputs, inputs = layer.weight.shape
        self._zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.gram, self.right = self._zeros(inputs, inputs), self._zeros(inputs, outputs)
        self.mean, self.output, self.total = self._zeros(inputs), self._zeros(outputs), 0.0

    def start(self) -> None:
        inputs = len(self.mean)
        # of x, m and 1 with x
        self._xx, self._mx = self._zeros(inputs, inputs), self._zeros(inputs, inputs)
        self._x, self._m, self._count = self._zeros(inputs), self._zeros(inputs), self._zeros(1)

    def add(self, x: Tensor, mixed: Tensor, weights: Tensor) -> None:
        """Take in a batch, (images, tokens, inputs)."""
        weighted = x * weights.to(x.dtype).unsqueeze(1)
        self._xx += weighted.flatten(0, 1).mT @ x.flatten(0, 1)
        self._mx += weighted.flatten(0, 1).mT @ mixed.flatten(0, 1)
        self._x += weighted.double().sum(dim=(0, 1))
        self._m += (mixed * weights.to(x.dtype).unsqueeze(1)).double().sum(dim=(0, 1))
        self._count += len(x) * weights.sum()

    def finish(self, theirs: Layer, fabric: L.Fabric) -> None:
        sums = self._xx, self._mx, self._x, self._m, self._count
        xx, mx, x, m, count = over_processes(fabric, *sums)
        share = 1 / (count * (xx / count).norm().clamp_min(TINY))
        weight, bias = theirs.weight.double(), theirs.bias.double()
        self.gram += share * xx
        self.right += share * (mx @ weight.mT)
        self.mean += share * x
        self.output += share * (weight @ m + count * bias)
        self.total += float(share * count)

    def solve(self, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weight and the bias, drawn to the anchor's."""
        penalised = self.gram.clone()
        penalised.diagonal().add_(ridge + TINY)
        solution = torch.linalg.solve(penalised, self.right + ridge * weight.mT).mT
        rest = self.output - solution @ self.mean + ridge * bias
        return solution, rest / (self.total + ridge)


class NormFit:
    """A layer norm's weight and bias, entry by entry; methods as in ``LinearFit``."""

    def __init__(self, layer: Layer, device: torch.device):
        self._zeros = torch.zeros(len(layer.weight), dtype=torch.float64, device=device)
        self.energy, self.mean = self._zeros.clone(), self._zeros.clone()
        self.with_energy, self.with_mean, self.tasks = self._zeros.clone(), self._zeros.clone(), 0

    def start(self) -> None:
        self._square, self._sum, self._count = (
            self._zeros.clone(),
            self._zeros.clone(),
            self._zeros[:1].clone(),
        )

    def add(self, x: Tensor, mixed: Tensor, weights: Tensor) -> None:
        """Take in a batch, (images, tokens, width)."""
        normal = F.layer_norm(x, x.shape[-1:]).double()
        self._square += (normal.square() * weights.unsqueeze(1)).sum(dim=(0, 1))
        self._sum += (normal * weights.unsqueeze(1)).sum(dim=(0, 1))
        self._count += len(x) * weights.sum()

    def finish(self, theirs: Layer, fabric: L.Fabric) -> None:
        sums = self._square, self._sum, self._count
        square, total, count = over_processes(fabric, *sums)
        energy, mean = square / count, total / count
        weight, bias = theirs.weight.double(), theirs.bias.double()
        self.energy, self.mean, self.tasks = self.energy + energy, self.mean + mean, self.tasks + 1
        self.with_energy += energy * weight + mean * bias
        self.with_mean += mean * weight + bias

    def solve(self, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weight and the bias, drawn to the anchor's."""
        a, b, c = self.energy + ridge, self.mean, self.tasks + ridge
        first, second = self.with_energy + ridge * weight, self.with_mean + ridge * bias
        determinant = (a * c - b.square()).clamp_min(TINY)
        return (c * first - b * second) / determinant, (a * second - b * first) / determinant
