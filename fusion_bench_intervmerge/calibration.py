"""Better weights for a merged encoder, in closed form, from a few unlabelled images of each task.

Two linear maps of a block write into the residual stream: the attention's output projection and the
MLP's last layer. From the first block to the last each is solved anew, for all tasks at once, so
that behind it the stream is as close as it can be to the one in each task's expert. With h what the
map reads in the calibrated encoder so far, s the stream that it adds to, and e the expert's stream
behind the expert's own map (W_t, b_t), of the same images and tokens::

    min over W, b   sum over tasks and rows  w |W h + b - y|^2  +  ridge * scale * |W - A|^2
    y = (1 - own_output) * (e - s) + own_output * (W_t h + b_t)
    A = W_pretrained + anchor * (W_merged - W_pretrained)

w weighs tokens: the class token counts twice as much as all patches together (class_weight), and
alone in the last block if nothing else is read there. scale is the mean variance of the entries of
h. Since each map is solved on what the maps before it give, errors do not add up from block to
block.

Only sums over rows are kept, for each fold of the images, so that the ridge of each map can be
chosen by cross-validation over images: rows of one image are not independent of each other.

Relatives: RegMean (arXiv 2212.09849) fits each linear map to the experts' outputs on their own
inputs; FeatCal (arXiv 2605.13030) on a mixture of the expert's and the merged encoder's.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, cast

import lightning as L
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear

from .config import ConfigError, Json, whole
from .data import (
    Datasets,
    ImageStates,
    RepairSettings,
    RunFolder,
    choose_images,
    computing_dtype,
    interruptible,
    progress_bar,
    read_images,
)
from .encoders.base import ExpertLoaders, ResidualMap, VisionTower, check_expert

log = logging.getLogger(__name__)

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(4, -9, -1))  # 100 to 1e-4
START = 1e-2  # where the search for the first ridge starts
SKETCH = 128  # random directions of the outputs in which ridges are compared
ROWS = 4096  # as many as wait for one product
PANEL = 256  # columns of a product of which only the upper triangle is needed
TINY, EPSILON = 1e-300, torch.finfo(torch.float64).eps
_POSITIVE = "null, or a positive number"


class CalibrationSettings(RepairSettings):
    """What ``calibrate`` takes.

    Args:
        ridge: how much is paid for leaving the anchor, in mean variances of what a map reads. Null:
            chosen for each map by cross-validation over images.
        anchor: where solutions are drawn to, from the pretrained weights (0) over the merged ones
            (1) to beyond them, as far again (2).
        folds: of the cross-validation.
        own_output: share of the target that is the output of the expert's own map, of what the
            calibrated encoder's reads; the rest brings its stream to the expert's.
        class_weight: what the class token counts for, in units of all patch tokens together.
    """

    ridge: Annotated[float | None, Field(gt=0, description=_POSITIVE)] = None
    anchor: Annotated[float, Field(ge=0, le=10, description="a number, 0 to 10")] = 2.0
    folds: Annotated[int, whole(2, 100)] = 3
    own_output: Annotated[float, Field(ge=0, le=1, description="a number, 0 to 1")] = 0.0
    class_weight: Annotated[float, Field(gt=0, le=1000, description="a number, above 0")] = 2.0


@torch.no_grad()
def calibrate(
    tower: VisionTower,
    pretrained: VisionTower,
    experts: ExpertLoaders,
    images: Datasets,
    settings: CalibrationSettings | None = None,
    *,
    fabric: L.Fabric | None = None,
    states: RunFolder | None = None,
    after_block: Callable[[int, Streams], None] | None = None,
    **keywords: object,
) -> VisionTower:
    """Solve the maps that write into the residual stream anew, block by block, without labels.

    Args:
        tower: the merged encoder; it is not changed.
        pretrained: what the experts were fine-tuned from.
        experts: task -> function that loads the expert. Each is loaded once; of all but one only
            files are kept.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        settings: how, as the method's config file says it.
        fabric: device, precision and processes; one device by default.
        states: where to keep the finished maps of a run that may be stopped, until ``clear``;
            None: nowhere.
        after_block: called with each block and the streams behind it, which it may change: the
            maps of the blocks that follow are solved on what it makes of them.
        keywords: in place of ``settings`` its fields, and those of its ``data``: ``split="train"``.

    Returns:
        A copy of ``tower`` with other weights in these maps, of the same shapes and types, on the
        same device.

    Raises:
        ConfigError: no experts, no images for a task, an expert of another architecture, or weights
            or images that are not finite.
        Interrupted: on Ctrl-C; the maps that were finished are kept.
    """
    settings = CalibrationSettings.of(settings, keywords)
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    check_inputs(tower, pretrained, experts, images)
    weight = settings.class_weight * (tower.num_tokens - 1)
    calibrated = copy.deepcopy(tower).to(fabric.device).eval()
    expert = copy.deepcopy(calibrated)
    dtype = computing_dtype(fabric)
    with (
        interruptible("calibrating", states),
        tempfile.TemporaryDirectory(prefix="experts-") as folder,
        calibrated.in_dtype(dtype),
        expert.in_dtype(dtype),
        progress_bar(fabric, "calibrating", tower.num_blocks) as shown,
    ):
        streams = Streams(calibrated, expert, experts, images, settings, fabric, Path(folder))
        streams.fill(settings.folds)
        solved: dict[tuple[int, int], Json] = {}
        for block in range(tower.num_blocks):
            tokens = token_weights(tower, block, weight).to(fabric.device)
            for index, map_ in enumerate(calibrated.residual_maps(block)):
                name, previous = f"map-{block}-{index}", solved.get((block - 1, index))
                state = None if states is None else states.load(name)
                if state is not None:
                    for task in streams.load_experts(block):
                        streams.targets[task].move(expert.residual_maps(block)[index].add)
                else:
                    merged = tower.residual_maps(block)[index]
                    first = pretrained.residual_maps(block)[index]
                    anchor = (
                        on_the_line(first.weight, merged.weight, settings.anchor).to(fabric.device),
                        on_the_line(first.bias, merged.bias, settings.anchor).to(fabric.device),
                    )
                    of = (map_, expert, (block, index))
                    sums = _sums(streams, *of, anchor, tokens, settings.own_output)
                    start = START if previous is None else previous["ridge"]
                    solution, bias, ridge = sums.solve(settings.ridge, map_.scale, start)
                    log.debug("block %d, map %d: ridge %.2g", block, index, ridge)
                    state = _written(map_.scale, merged, solution, bias) | {"ridge": ridge}
                    if states is not None and fabric.is_global_zero and states.save(name, state):
                        after = f"block {block}, map {index}"
                        states.progress = f"the same command goes on after {after}"
                solved[block, index] = state
                _write(state, map_)
                streams.move(map_)
            if after_block is not None:
                after_block(block, streams)
            shown.update()
    for (block, index), state in solved.items():  # in their own type now
        _write(state, calibrated.residual_maps(block)[index])
    return calibrated.to(tower.device)


def on_the_line(pretrained: Tensor, merged: Tensor, position: float) -> Tensor:
    """Pretrained weights at position 0, merged ones at 1, to the bit; in float64."""
    return merged.double() + (position - 1) * (merged.double() - pretrained.double())


def _sums(
    streams: Streams,
    map_: ResidualMap,
    expert: VisionTower,
    place: tuple[int, int],
    anchor: tuple[Tensor, Tensor],
    tokens: Tensor,
    own_output: float,
) -> Sums:
    """The sums of a map's regression; the experts' own maps add to their streams."""
    block, index = place
    read = tokens.nonzero().squeeze(1)
    shift = torch.zeros(anchor[0].shape[1], dtype=torch.float64, device=tokens.device)
    if streams.fabric.is_global_zero:
        shift += map_.reads(streams.first_batch())[:, read].double().mean(dim=(0, 1))
    sums = Sums(streams.folds, *anchor, streams.fabric.broadcast(shift))
    for task in streams.load_experts(block):
        own = expert.residual_maps(block)[index]
        streams.targets[task].move(own.add)
        for position, (fold, state, target) in enumerate(streams.batches(task)):
            x, y = streams.read(map_, task, position, state)[:, read], (target - state)[:, read]
            if map_.scale is not None:
                y = y / torch.where(map_.scale == 0, torch.inf, map_.scale)
            if own_output > 0:
                y = torch.lerp(y, linear(x, own.weight, own.bias), own_output)
            sums.add(fold, x.flatten(0, 1), y.flatten(0, 1), tokens[read].repeat(len(x)))
    return sums.gather(streams.fabric)


def _written(scale: Tensor | None, merged: ResidualMap, weight: Tensor, bias: Tensor) -> Json:
    """A solution in the merged map's type; an output that is scaled to nothing stays as it is."""
    weight, bias = weight.to(merged.weight), bias.to(merged.bias)
    if scale is not None:
        gone = (scale == 0).to(weight.device)
        weight = torch.where(gone.unsqueeze(1), merged.weight, weight)
        bias = torch.where(gone, merged.bias, bias)
    return {"weight": weight.cpu(), "bias": bias.cpu()}


def _write(state: Json, map_: ResidualMap) -> None:
    map_.weight.data.copy_(state["weight"])
    map_.bias.data.copy_(state["bias"])


def token_weights(tower: VisionTower, block: int, class_weight: float) -> Tensor:
    """(num_tokens), what each token of a block counts."""
    read = tower.reads_patches or block < tower.num_blocks - 1
    weights = torch.full((tower.num_tokens,), 1.0 if read else 0.0)
    weights[0] = class_weight
    return weights


def over_processes(fabric: L.Fabric, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor's sum over all processes."""
    return tuple(cast(Tensor, fabric.all_reduce(t, reduce_op="sum")) for t in tensors)


def check_inputs(
    tower: VisionTower, pretrained: VisionTower, experts: ExpertLoaders, images: Datasets
) -> None:
    """Make sure that there are experts, images of each, and a pretrained encoder that fits.

    Raises:
        ConfigError: what is missing.
    """
    if not experts:
        raise ConfigError("modelpool.models", "there are no experts", "one model per task")
    for task in experts:
        if task not in images:
            raise ConfigError("modelpool", f"no images for task {task!r}")
    check_expert("_pretrained_", pretrained, tower)


class Streams:
    """The images' residual streams in the calibrated encoder and in their experts.

    Args:
        calibrated: the encoder that is being calibrated.
        expert: a tower of the same architecture, whose blocks take the experts' weights.
        experts, images, fabric: as in ``calibrate``.
        settings: which images, and how they are read.
        folder: where the experts' blocks are kept.

    Attributes:
        folds: into how many folds the images are divided.
        states, targets: task -> its images' streams, in batches of one fold each; each process has
            its share of them.
    """

    def __init__(
        self,
        calibrated: VisionTower,
        expert: VisionTower,
        experts: ExpertLoaders,
        images: Datasets,
        settings: RepairSettings,
        fabric: L.Fabric,
        folder: Path,
    ):
        self.fabric, self.folds = fabric, 1
        self.states: dict[str, ImageStates] = {}
        self.targets: dict[str, ImageStates] = {}
        self._calibrated, self._expert, self._experts = calibrated, expert, experts
        self._images, self._settings, self._folder = images, settings, folder
        self._fold: dict[str, list[int]] = {}  # of each batch
        self._inputs: dict[tuple[str, int], Tensor] = {}  # of the map that is solved, by batch
        self._room = settings.data.cache_gb * 2**30 / 2

    def fill(self, folds: int) -> None:
        """Load each expert once, and read the images.

        Args:
            folds: into how many folds; fewer if there are not as many images.

        Raises:
            ConfigError: as in ``calibrate``.
        """
        data, seed, fabric = self._settings.data, self._settings.seed, self.fabric
        chosen = {t: choose_images(t, len(self._images[t]), data, seed) for t in self._experts}
        self.folds = min(folds, sum(map(len, chosen.values())))
        room = data.cache_gb * 2**30 / (4 * len(chosen))
        width = self._calibrated.num_tokens * self._calibrated.width
        size, seen = max(16, min(256, 2**20 // width)), 0
        for task, indices in chosen.items():
            self._load(task)
            batches = []  # the images of all tasks take turns in the folds
            for fold in range(self.folds):
                own = indices[(fold - seen) % self.folds :: self.folds]
                starts = range(0, len(own), size)
                batches += [(fold, [(task, i) for i in own[s : s + size]]) for s in starts]
            seen += len(indices)
            mine = batches[fabric.global_rank :: fabric.world_size]
            self._fold[task] = [fold for fold, _ in mine]
            states, targets = (ImageStates(room, fabric.device) for _ in range(2))
            keys = [batch for _, batch in mine]
            for pixels in read_images(self._images, keys, data.num_workers):
                if not pixels.isfinite().all():
                    problem = f"an image of {task!r} has pixels that are not finite"
                    raise ConfigError("modelpool", problem)
                pixels = pixels.to(fabric.device, self._calibrated.dtype)
                states.append(self._calibrated.embed(pixels))
                targets.append(self._expert.embed(pixels))
            self.states[task], self.targets[task] = states, targets

    def _load(self, task: str) -> None:
        """Write an expert's blocks to its file, and take over what comes before them."""
        loaded, expert = self._experts[task](), self._expert
        check_expert(task, loaded, expert)
        expert.load_weights(loaded.weights())
        tensors = {
            f"{block}.{name}": tensor.contiguous()
            for block in range(expert.num_blocks)
            for name, tensor in expert.block(block).state_dict().items()
        }
        save_file(tensors, self._folder / f"{task}.safetensors")

    def load_experts(self, block: int) -> Iterator[str]:
        """Each task, while a block of ``expert`` has the weights of the task's expert."""
        module = self._expert.block(block)
        for task in self.states:
            with safe_open(self._folder / f"{task}.safetensors", framework="pt") as file:
                names = module.state_dict()
                module.load_state_dict({n: file.get_tensor(f"{block}.{n}") for n in names})
            yield task

    def batches(self, task: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A task's batches: the fold, and the states in the calibrated encoder and the expert."""
        return zip(self._fold[task], self.states[task], self.targets[task], strict=True)

    def read(self, map_: ResidualMap, task: str, position: int, state: Tensor) -> Tensor:
        """What a map reads of a batch; kept for ``move``, if there is room."""
        inputs = map_.reads(state)
        if inputs.nbytes <= self._room:
            self._inputs[task, position] = inputs
            self._room -= inputs.nbytes
        return inputs

    def move(self, map_: ResidualMap) -> None:
        """Replace the calibrated encoder's streams by those behind a map."""
        for task, states in self.states.items():
            for position, state in enumerate(states):
                inputs = self._inputs.pop((task, position), None)
                states[position] = map_.add(state, inputs)
                self._room += 0 if inputs is None else inputs.nbytes

    def first_batch(self) -> Tensor:
        """Of the first task, in the first process."""
        return next(iter(next(iter(self.states.values()))))


class Sums:
    """Sums over the weighted rows of a regression of y on [x, 1], for each fold.

    Rows are shifted, x by a vector near its mean and y by what the anchor makes of that vector, so
    that large means do not cancel. Products are made in the rows' precision, float32 at least, and
    added up in float64.

    Args:
        folds: how many.
        weight, bias: the anchor, (outputs, inputs) and (outputs), float64.
        shift: (inputs), float64.

    Attributes:
        second: (folds, inputs + 1, inputs + 1 + outputs), of [x, 1]' [x, 1, y], once ``gather``
            was called.
    """

    def __init__(self, folds: int, weight: Tensor, bias: Tensor, shift: Tensor):
        self.weight, self.bias, self.shift = weight, bias, shift
        outputs, inputs = weight.shape
        self._output_at_shift = weight @ shift + bias
        self.second = weight.new_zeros(folds, inputs + 1, inputs + 1 + outputs)
        self._waiting: list[list[Tensor]] = [[] for _ in range(folds)]

    def add(self, fold: int, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Take in rows.

        Args:
            fold: theirs.
            x, y: (rows, inputs) and (rows, outputs).
            weights: (rows), positive.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(wide) - self.shift.to(wide), y.to(wide) - self._output_at_shift.to(wide)
        root = weights.to(wide).sqrt().unsqueeze(1)
        waiting = self._waiting[fold]
        waiting.append(torch.cat([x, torch.ones_like(root), y], dim=1) * root)
        if sum(map(len, waiting)) >= ROWS:
            self._add_up(fold)

    def _add_up(self, fold: int) -> None:
        if self._waiting[fold]:
            rows = torch.cat(self._waiting[fold])
            for start, stop in self._panels():
                self.second[fold, start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]
            self._waiting[fold].clear()

    def _panels(self) -> Iterator[tuple[int, int]]:
        inputs = self.second.shape[1]
        return ((start, min(start + PANEL, inputs)) for start in range(0, inputs, PANEL))

    def gather(self, fabric: L.Fabric) -> Sums:
        """The sums over all processes' rows."""
        for fold, second in enumerate(self.second):
            self._add_up(fold)
            for start, stop in self._panels():  # the lower triangle from the upper one
                second[stop:, start:stop] = second[start:stop, stop : len(second)].T
        (self.second,) = over_processes(fabric, self.second)
        return self

    def solve(
        self, ridge: float | None, scale: Tensor | None = None, start: float = START
    ) -> tuple[Tensor, Tensor, float]:
        """W (outputs, inputs), b (outputs) and the ridge, chosen by cross-validation if None.

        Args:
            ridge: as in the module's formula.
            scale: (outputs), of what is behind the map; in its units errors are compared.
            start: of ``RIDGES``, where the search starts.
        """
        total = self.second.sum(dim=0)
        if ridge is None:
            ridge = self._best_ridge(total, scale, start)
        weight, bias = _Ridge(total, self.weight).solve(ridge)
        return weight, self._output_at_shift + bias - weight @ self.shift, ridge

    def _best_ridge(self, total: Tensor, scale: Tensor | None, start: float) -> float:
        """The one whose solutions are closest to the rows of the folds that they have not seen.

        The distance falls and then rises with the ridge: its minimum is found downhill. It is
        compared in ``SKETCH`` random directions of the outputs, if there are more of them.
        """
        if len(self.second) == 1:
            return RIDGES[0]
        outputs, inputs = self.weight.shape
        directions = torch.eye(outputs, dtype=torch.float64)
        if outputs > SKETCH:
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(outputs, SKETCH, dtype=torch.float64, generator=generator)
        directions = directions.to(total.device)
        if scale is not None:
            directions *= scale.double().unsqueeze(1)
        anchor = directions.T @ self.weight
        folds = []
        for second in self.second:
            seen, left = (
                torch.cat([s[:, : inputs + 1], s[:, inputs + 1 :] @ directions], dim=1)
                for s in (total - second, second)
            )
            folds.append((_Ridge(seen, anchor), left))

        @cache
        def distance(index: int) -> float:
            """But for what does not depend on the ridge."""
            result = 0.0
            for solver, left in folds:
                weight, bias = solver.solve(RIDGES[index])
                both = torch.cat([weight.T, bias.unsqueeze(0)])
                gram, cross = left[:, : inputs + 1], left[:, inputs + 1 :]
                result += float((both * (gram @ both - 2 * cross)).sum())
            return result

        best = RIDGES.index(start)
        for step in (-1, 1):  # the larger of equals
            while 0 <= best + step < len(RIDGES) and distance(best + step) < distance(best):
                best += step
        return RIDGES[best]


class _Ridge:
    """The regression whose sums are ``second``, as in ``Sums``, drawn to an anchor."""

    def __init__(self, second: Tensor, anchor: Tensor):
        inputs = len(second) - 1
        count = second[-1, inputs].clamp_min(TINY)
        self._mean_x, self._mean_y = second[:-1, inputs] / count, second[-1, inputs + 1 :] / count
        gram = second[:-1, :inputs]
        self._gram = gram - count * torch.outer(self._mean_x, self._mean_x)
        cross = second[:-1, inputs + 1 :] - count * torch.outer(self._mean_x, self._mean_y)
        self._missing = cross - self._gram @ anchor.T
        self._anchor = anchor
        self._scale = self._gram.diagonal().mean()
        # nothing is known of directions in which x varies no more than rounding makes it
        self._floor = inputs * EPSILON * gram.diagonal().mean() + TINY

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """W (outputs, inputs) and b (outputs)."""
        penalised = self._gram.clone()
        penalised.diagonal().add_(ridge * self._scale + self._floor)
        change = torch.cholesky_solve(self._missing, torch.linalg.cholesky(penalised))
        weight = self._anchor + change.T
        return weight, self._mean_y - weight @ self._mean_x
