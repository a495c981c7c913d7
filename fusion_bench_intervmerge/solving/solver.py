"""Edits in closed form: block by block, the repaired encoder is brought back to the expert.

For one task, from the first block to the last: with z the states of the *repaired* encoder so far
and t the expert's of the same images and tokens, find the edit of z that comes closest to t in
weighted least squares, apply it, go on (``regression.Regression`` has the formula). Each image
passes once through the merged encoder and once through its expert. Nothing is differentiated.

What an edit at a site has to make up for is the difference of the residual streams behind it:

========== ==================== ==================================================
site       it reads x           it should add y
========== ==================== ==================================================
attention  attention output a   (expert's h + a) - (h + a), h being what enters
mlp        MLP output m         expert's block output - block output
block      block output z       expert's block output - z
output     image features f     expert's image features - f
========== ==================== ==================================================

Tokens are weighed: the class token as much as half of the patches together, in the last block it
alone, since nothing else is read there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..encoders import VisionTower
from ..encoders.base import Edit
from ..errors import ConfigError
from ..images import choose_images, read_images
from ..interventions import Placement
from ..interventions.functions import function_class
from ..model import InterventionModel
from .budget import allocate
from .regression import Moments, Regression
from .states import States

log = logging.getLogger(__name__)

Experts = Mapping[str, Callable[[], VisionTower]]
Place = tuple[str, int]  # site, block
SITES_IN_ORDER = ("attention", "mlp", "block")


@dataclass
class Solution:
    """What ``solve`` did.

    Attributes:
        images: task -> dataset indices of the images seen.
        expert_features: task -> (images seen, projection_dim).
        gains: task -> (site, block) -> what each further rank there takes off the mean squared
            distance of a row to the expert's.
        seconds: wall-clock time of ``solving``.
    """

    images: dict[str, list[int]]
    expert_features: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, dict[Place, list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def solve(
    model: InterventionModel,
    experts: Experts,
    images: Mapping[str, Dataset],
    *,
    budget: int | None = None,
    fraction: float = 1.0,
    at_most: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    cache_gb: float = 2.0,
    ridge: float = 1e-3,
    class_weight: float | None = None,
    fabric: L.Fabric | None = None,
) -> Solution:
    """Find the edits of sites whose ``init`` is ``regression``, in closed form, without labels.

    Args:
        model: the model, whose edits at these sites are replaced; other edits act as they are.
        experts: task -> function that loads the expert; one expert is in memory at a time.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        budget: numbers to spend over all tasks. They go, rank by rank, to the (task, site, block)
            where the next one takes most off the distance to the expert, as a first solution at
            full rank tells; ``rank`` is then not read. None: every edit has the rank of its config.
        fraction, at_most, seed: which images, as in ``choose_images``.
        num_workers: worker processes that decode images.
        cache_gb: GiB of memory for the images' states; beyond it they lie in a temporary file.
        ridge: of the regressions, in mean variances of what an edit reads.
        class_weight: how many patch tokens the class token counts for; half of them by default.
        fabric: device, precision and processes; one device by default.

    Raises:
        ConfigError: no such site, a form without a closed solution, no images for a task, or a
            budget that buys not one rank.
    """
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    for task in experts:
        model.check_task(task)
        if task not in images:
            raise ConfigError("modelpool", f"no images for task {task!r}")
    chosen = {
        task: choose_images(
            task,
            len(images[task]),  # type: ignore[arg-type]
            fraction=fraction,
            at_most=at_most,
            seed=seed,
        )
        for task in experts
    }
    places = solved_places(model)
    solution = Solution(chosen)
    weight = class_weight if class_weight is not None else (model.tower.num_tokens - 1) / 2
    started = time.perf_counter()
    home = model.tower.device
    model.to(fabric.device)

    def sweep(task: str, ranks: Mapping[Place, int] | None) -> None:
        reader = [(task, index) for index in chosen[task]]
        with _Sweep(
            model, task, experts[task](), images, reader, places, fabric, cache_gb, num_workers
        ) as run:
            run.class_weight, run.ridge = weight, ridge
            solution.gains[task], solution.expert_features[task] = run(ranks)

    try:
        if budget is None:
            ranks = {place: model.interventions[place[0]].rank for place in places}
            for task in experts:
                sweep(task, ranks)
        else:
            for task in experts:
                sweep(task, None)
            shares = allocate_ranks(model, solution.gains, budget)
            gains = solution.gains.copy()
            for task in experts:
                sweep(task, shares[task])
            solution.gains = gains
    finally:
        model.to(home)
    solution.seconds["solving"] = time.perf_counter() - started
    return solution


def solved_places(model: InterventionModel) -> list[Place]:
    """Where a model has edits to solve, in the order of the forward pass.

    Raises:
        ConfigError: a form without a closed solution, or nothing to solve.
    """
    sites = [s for s, config in model.interventions.items() if config.init == "regression"]
    if not sites:
        raise ConfigError("interventions", "no site's init is regression", "init: regression")
    for site in sites:
        config = model.interventions[site]
        if config.activation is not None or not function_class(config.function).is_solvable():
            what = config.function + (f" with {config.activation}" if config.activation else "")
            raise ConfigError(
                f"interventions.{site}.init",
                f"{what} has no closed solution",
                "regression for nodireft, noreft, loreft, direft, consreft and lobireft",
            )
    inside = [
        (site, block)
        for block in range(model.tower.num_blocks)
        for site in SITES_IN_ORDER
        if site in sites and block in model.placements[site].blocks
    ]
    return inside + [("output", 0)] * ("output" in sites)


def allocate_ranks(
    model: InterventionModel, gains: Mapping[str, Mapping[Place, Sequence[float]]], budget: int
) -> dict[str, dict[Place, int]]:
    """Task -> place -> rank, within a budget over all tasks.

    Raises:
        ConfigError: the budget buys not one rank.
    """
    task = next(iter(gains))
    costs = {}
    for site, block in gains[task]:
        function = model.set_rank(task, site, block, 1)
        assert function is not None
        costs[site] = sum(parameter.numel() for parameter in function.parameters())
        model.set_rank(task, site, block, 0)
    flat = {(task, place): g for task, of in gains.items() for place, g in of.items()}
    ranks = allocate(flat, {key: costs[key[1][0]] for key in flat}, budget)
    return {task: {place: ranks[task, place] for place in of} for task, of in gains.items()}


class _Sweep:
    """One task's images on their way through the blocks of the repaired encoder and the expert."""

    class_weight: float
    ridge: float

    def __init__(
        self,
        model: InterventionModel,
        task: str,
        expert: VisionTower,
        images: Mapping[str, Dataset],
        keys: Sequence[tuple[str, int]],
        places: Sequence[Place],
        fabric: L.Fabric,
        cache_gb: float,
        num_workers: int,
    ):
        self.model, self.task, self.places, self.fabric = model, task, places, fabric
        self.tower, self.expert = model.tower, expert.to(fabric.device).eval()
        self.count = len(keys)
        tower = self.tower
        size = max(16, min(256, 2**20 // (tower.num_tokens * tower.width)))
        rows = torch.arange(len(keys)).split(size)
        self.rows = rows[fabric.global_rank :: fabric.world_size]
        batches = [[keys[row] for row in part.tolist()] for part in self.rows]
        self.reader = read_images(images, batches, num_workers)
        self.room = cache_gb * 2**30
        self._stack = ExitStack()

    def __enter__(self) -> _Sweep:
        for place in self.places:
            self.model.set_rank(self.task, *place, 0)
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def __call__(
        self, ranks: Mapping[Place, int] | None
    ) -> tuple[dict[Place, list[float]], Tensor]:
        """Solve every place; at full rank where ``ranks`` is None.

        Returns:
            Gains by place, and the expert's image features (images, projection_dim).
        """
        gains: dict[Place, list[float]] = {}
        states, targets = self._embed()
        last = self.tower.num_blocks - 1
        needed = last if ("output", 0) in self.places else max(b for _, b in self.places)
        for block in range(last + 1):
            lean = block == last and self._class_token_alone
            sites = [site for site, at in self.places if at == block and site != "output"]
            if not sites and block <= needed:
                for index, state in enumerate(states):
                    states[index] = self._student(block, state, lean)[0]
            for site in sites:
                final = site == sites[-1]
                moments = Moments(self._placement(site).width, self._groups(site), self.device)
                for index, (state, target) in enumerate(zip(states, targets, strict=True)):
                    out, x = self._student(block, state, lean, site)
                    wanted, there = self._teacher(block, target, lean, site)
                    reached = out
                    if site == "attention":
                        reached = state[:, : x.shape[1]] + x
                        wanted_here = target[:, : x.shape[1]] + there
                    else:
                        wanted_here = wanted
                    self._add(moments, site, block, x, wanted_here - reached)
                    if final:
                        targets[index] = wanted
                        if site == "block":
                            states[index] = out
                gains[site, block] = self._place(site, block, moments, ranks)
                if final and site == "block":
                    for index, state in enumerate(states):
                        with self.model.for_task(self.task):
                            states[index] = self.model.apply_edit(site, block, state)
                elif final:
                    for index, state in enumerate(states):
                        states[index] = self._student(block, state, lean)[0]
            if not sites:
                for index, target in enumerate(targets):
                    targets[index] = self._teacher(block, target, lean)[0]
        features = [self.expert.readout(target).float() for target in targets]
        if ("output", 0) in self.places:
            moments = Moments(self._placement("output").width, 1, self.device)
            for state, target in zip(states, features, strict=True):
                with self.model.for_task(self.task), self.model.without_edit("output", 0):
                    x = self.tower.readout(state).float().unsqueeze(1)
                self._add(moments, "output", 0, x, target.unsqueeze(1) - x)
            gains["output", 0] = self._place("output", 0, moments, ranks)
        return gains, self._gathered(features)

    # -- one batch in one block --------------------------------------------------------------------

    def _student(
        self, block: int, states: Tensor, lean: bool, site: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """What leaves a block of the repaired encoder, and a site's tensor, both unedited there."""
        with self.model.for_task(self.task), ExitStack() as stack:
            if site is not None:
                stack.enter_context(self.model.without_edit(site, block))
            return _run(self.tower, block, states, lean, site, self.model.apply_edit)

    def _teacher(
        self, block: int, states: Tensor, lean: bool, site: str | None = None
    ) -> tuple[Tensor, Tensor]:
        return _run(self.expert, block, states, lean, site, lambda site, block, z: z)

    def _add(self, moments: Moments, site: str, block: int, x: Tensor, y: Tensor) -> None:
        placement, alone = self._placement(site), x.shape[1] == 1
        tokens = slice(0, 1) if alone or placement.tokens is None else placement.tokens
        part = placement.parts[block]
        x, y = x[:, tokens][..., part], y[:, tokens][..., part]
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(wide), y.to(wide)
        weights = torch.ones(1) if alone else self._weights(block)[tokens]
        if placement.copies is None:
            weights = weights.repeat(len(x)).unsqueeze(0)
            moments.add(x.flatten(0, 1)[None], y.flatten(0, 1)[None], weights.to(x.device))
        else:
            weights = weights.unsqueeze(1).expand(-1, len(x))
            moments.add(x.transpose(0, 1), y.transpose(0, 1), weights.to(x.device))

    def _weights(self, block: int) -> Tensor:
        weights = torch.full((self.tower.num_tokens,), float(block < self.tower.num_blocks - 1))
        weights[0] = self.class_weight
        return weights

    # -- one place ---------------------------------------------------------------------------------

    def _place(
        self, site: str, block: int, moments: Moments, ranks: Mapping[Place, int] | None
    ) -> list[float]:
        """Put the solved edit into the model; what each rank there gains."""
        moments = self._reduced(moments)
        regression = Regression(moments, self.ridge)
        form = function_class(self.model.interventions[site].function)
        # one rank for all copies, so what it gains is the mean over them
        gains = [g for g in form.gains(regression).mean(dim=0).tolist()]
        positive = next((i for i, g in enumerate(gains) if g <= 0), len(gains))
        rank = positive if ranks is None else ranks[site, block]
        if not moments.weight.any():
            rank = 0  # no token here is read by anything
        function = self.model.set_rank(self.task, site, block, rank)
        if function is not None:
            solved = form.solved(regression, rank)
            alone = self._placement(site).copies is None
            function.load({n: t.squeeze(0) if alone else t for n, t in solved.items()})
        return gains[:positive]

    def _placement(self, site: str) -> Placement:
        return self.model.placements[site]

    def _groups(self, site: str) -> int:
        return self._placement(site).copies or 1

    @cached_property
    def _class_token_alone(self) -> bool:
        """Whether the last block may work on the class token alone: no edit there needs others."""
        last = self.tower.num_blocks - 1
        return all(
            isinstance(p.tokens, slice) and p.tokens.start == 0 and p.copies is None
            for site, p in self.model.placements.items()
            if site != "output" and last in p.blocks
        )

    # -- the images' states ------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def _embed(self) -> tuple[States, States]:
        states, targets = States(self.room / 2, self.device), States(self.room / 2, self.device)
        for images in self.reader:
            pixels = images.to(self.device, self.tower.dtype)
            states.append(self.tower.embed(pixels))
            targets.append(self.expert.embed(pixels))
        return states, targets

    # -- processes ---------------------------------------------------------------------------------

    def _reduced(self, moments: Moments) -> Moments:
        if self.fabric.world_size == 1:
            return moments
        parts = [self.fabric.all_gather(tensor) for tensor in moments.tensors()]
        total = Moments.of([part[0] for part in parts])  # type: ignore[index]
        for rank in range(1, self.fabric.world_size):
            total.merge(Moments.of([part[rank] for part in parts]))  # type: ignore[index]
        return total

    def _gathered(self, features: list[Tensor]) -> Tensor:
        whole = torch.zeros(self.count, self.tower.projection_dim, device=self.device)
        for rows, values in zip(self.rows, features, strict=True):
            whole[rows.to(self.device)] = values
        if self.fabric.world_size > 1:
            whole = self.fabric.all_reduce(whole, reduce_op="sum")  # type: ignore[assignment]
        return whole.cpu()


def _run(
    tower: VisionTower, block: int, states: Tensor, lean: bool, site: str | None, edit: Edit
) -> tuple[Tensor, Tensor]:
    """States that leave a block, and the tensor of one of its sites."""
    seen: list[Tensor] = []

    def watch(name: str, index: int, z: Tensor) -> Tensor:
        if name == site:
            seen.append(z)
        return edit(name, index, z)

    with ExitStack() as stack:
        if site in ("attention", "mlp"):
            hook = tower.site(site, block).register_forward_hook(
                lambda module, args, output: seen.append(tower.site_tensor(output))
            )
            stack.callback(hook.remove)
        if lean:
            out = tower.run_block_for_class_token(block, states, watch)
        else:
            out = tower.run_block(block, states)
    return out, (seen[0] if seen else out)
