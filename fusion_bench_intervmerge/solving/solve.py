"""``solve``: edits in closed form for every task, at given ranks or within a budget."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import lightning as L
import torch
from pydantic import Field
from torch import Tensor

from ..config import ConfigError, Json, whole
from ..data import (
    Datasets,
    RepairSettings,
    RunFolder,
    choose_images,
    computing_dtype,
    interruptible,
    progress_bar,
)
from ..encoders.base import ExpertLoaders, check_expert
from ..interventions.edits import Edits
from ..interventions.functions import function_class
from ..interventions.sites import SITES
from ..model.model import InterventionModel
from .sweep import CLASS_WEIGHT, Place, Sweep

_MOST = 10**12
_RANKS = Annotated[str, Field(pattern=r"^rank_[1-9]\d{0,5}$")]
_ALLOWED = f"null, or a whole number, 1 to {_MOST}, or rank_R: as many as rank R at every place"


class SolveSettings(RepairSettings):
    """What ``solve`` takes.

    Args:
        budget: extra parameters over all tasks, given out as ranks where they help most; for
            ``init: regression``. ``rank_4``: as many as rank 4 takes at every place, on any
            encoder. Null: every edit has the ``rank`` of its site.
    """

    budget: Annotated[
        Annotated[int, whole(1, _MOST)] | _RANKS | None, Field(description=_ALLOWED)
    ] = None


Key = TypeVar("Key", bound=Hashable)
Gains = dict[Place, list[float]]


def allocate(
    gains: Mapping[Key, Sequence[float]], costs: Mapping[Key, int], budget: int
) -> dict[Key, int]:
    """Ranks by place: the greedy choice of the largest gain per parameter, until nothing fits.

    Gains fall from rank to rank, so at equal costs no other choice within the budget gains more.

    Args:
        gains: place -> what its first, second, ... rank gains; it ends at the first that gains
            nothing.
        costs: place -> parameters that each rank takes.
        budget: parameters that may be spent.

    Returns:
        Key -> its rank, zero allowed; the ranks' parameters never exceed the budget.
    """
    ranks = dict.fromkeys(gains, 0)
    order = {place: index for index, place in enumerate(gains)}  # decides between equal gains
    waiting = [(-g[0] / costs[p], order[p], p) for p, g in gains.items() if len(g) and g[0] > 0]
    heapq.heapify(waiting)
    while waiting:
        _, index, place = heapq.heappop(waiting)
        if costs[place] > budget:
            continue
        budget -= costs[place]
        ranks[place] += 1
        rest = gains[place][ranks[place] :]
        if len(rest) and rest[0] > 0:
            heapq.heappush(waiting, (-rest[0] / costs[place], index, place))
    return ranks


@dataclass
class Solution:
    """The result of ``solve``.

    Attributes:
        images: task -> dataset indices of the images seen.
        expert_features: task -> (images seen, projection_dim).
        gains: task -> place -> what each further rank there takes off the mean squared distance of
            a row to the expert's.
        seconds: wall-clock time, as ``solving``.
        states: where finished tasks are kept on disk, if they are.
    """

    images: dict[str, list[int]]
    expert_features: dict[str, Tensor]
    gains: dict[str, dict[Place, list[float]]]
    seconds: dict[str, float]
    states: RunFolder | None = None


@torch.no_grad()
def solve(
    model: InterventionModel,
    experts: ExpertLoaders,
    images: Datasets,
    settings: SolveSettings | None = None,
    *,
    ridge: float | None = None,
    class_weight: float = CLASS_WEIGHT,
    fabric: L.Fabric | None = None,
    states: RunFolder | None = None,
    **keywords: object,
) -> Solution:
    """Find the edits of sites whose ``init`` is ``regression``, in closed form, without labels.

    A budget goes, rank by rank, to the (task, site, block) where the next rank takes most off the
    distance to the expert, as measured by a first solution at full rank. Images' states that do not
    fit in ``data.cache_gb`` are in a temporary file.

    Args:
        model: the model, whose edits at these sites are replaced; other edits act as they are.
        experts: task -> function that loads the expert; one expert is in memory at a time.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        settings: how, as the method's config file says it.
        ridge: of the regressions, in mean variances of what an edit reads (0 is for float64 alone,
            whose rounding it does not fit); None chooses one for each by generalised
            cross-validation.
        class_weight: what the class token counts for, in units of all patch tokens together.
        fabric: device, precision and processes; one device by default.
        states: where to keep the finished tasks of a run that may be stopped; None: nowhere.
        keywords: in place of ``settings`` its fields, and those of its ``data``: ``budget=6192``.

    Raises:
        ConfigError: no such site, a form without a closed solution, no images for a task, or a
            budget below the cost of one rank.
        Interrupted: on Ctrl-C; finished tasks are kept.
    """
    settings = SolveSettings.of(settings, keywords)
    data, budget = settings.data, budget_in_numbers(settings.budget, model, len(experts))
    cheapest = min(_cost_of_a_rank(model).values(), default=0)
    if budget is not None and budget < cheapest:
        problem = f"{budget} parameters are below the cost of one rank"
        raise ConfigError("budget", problem, f"{cheapest} or more")
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    for task in experts:
        model.edits_of(task)
        if task not in images:
            raise ConfigError("modelpool", f"no images for task {task!r}")
    chosen = {task: choose_images(task, len(images[task]), data, settings.seed) for task in experts}
    places = solved_places(model)
    finished = _Finished(states, len(experts), writes=fabric.is_global_zero)
    started = time.perf_counter()
    home, dtype = model.tower.device, computing_dtype(fabric)
    weight = class_weight * (model.tower.num_tokens - 1)
    gains: dict[str, Gains] = {}
    features: dict[str, Tensor] = {}

    def sweep(task: str, ranks: Mapping[Place, int] | None) -> Sweep:
        keys = [(task, index) for index in chosen[task]]
        expert = experts[task]()
        check_expert(task, expert, model.tower)
        done = Sweep(
            model=model,
            task=task,
            fabric=fabric,
            ridge=ridge,
            class_weight=weight,
            ranks=ranks,
            expert=expert,
            places=places,
        )
        with model.for_task(task), expert.in_dtype(dtype), model.tower.in_dtype(dtype):
            done.run(images, keys, data.num_workers, data.cache_gb * 2**30, shown.update)
        return done

    def measured(task: str) -> Json:
        state = {"gains": sweep(task, None).gains}
        for place in places:  # at full rank they are large
            model.edits_of(task).set_rank(*place, 0)
        return state

    def solved(task: str) -> Json:
        done, edits = sweep(task, ranks[task]), model.edits_of(task)
        return {
            "gains": gains.get(task, done.gains),
            "features": done.features,
            "edits": {
                place: (function.rank, {n: t.cpu() for n, t in function.tensors().items()})
                for place in places
                if (function := edits.at(*place)) is not None
            },
        }

    blocks = model.tower.num_blocks * len(chosen) * (1 if budget is None else 2)
    try:
        model.to(fabric.device)
        with interruptible("solving", states), progress_bar(fabric, "solving", blocks) as shown:
            same = {place: model.interventions[place[0]].rank for place in places}
            ranks = dict.fromkeys(experts, same)
            if budget is not None:
                for task in experts:
                    gains[task] = finished.once("measured", task, measured)["gains"]
                ranks = share_out(model, gains, budget)
            for task in experts:
                state = finished.once("solved", task, solved)
                features[task], gains[task] = state["features"], state["gains"]
                for place in places:
                    rank, tensors = state["edits"].get(place, (0, {}))
                    if function := model.edits_of(task).set_rank(*place, rank):
                        function.load(tensors)
    finally:
        model.to(home)
    return Solution(
        images=chosen,
        expert_features=features,
        gains=gains,
        seconds={"solving": time.perf_counter() - started},
        states=states if fabric.is_global_zero else None,
    )


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
        if SITES[site].closed_form is None:
            solvable = ", ".join(name for name, each in SITES.items() if each.closed_form)
            problem = "edits at this site are not solved in closed form"
            raise ConfigError(f"interventions.{site}.init", problem, f"regression at {solvable}")
        if config.activation is not None or not function_class(config.function).solvable:
            what = config.function + (f" with {config.activation}" if config.activation else "")
            raise ConfigError(
                f"interventions.{site}.init",
                f"{what} has no closed solution",
                "regression for nodireft, noreft, loreft, direft, consreft and lobireft",
            )
    inside = [
        (site, block)
        for block in range(model.tower.num_blocks)
        # an edit at a site takes in what the edits before it did
        for site in SITES
        if site in sites and SITES[site].in_blocks and block in model.placements[site].blocks
    ]
    return inside + [("output", 0)] * ("output" in sites)


def share_out(
    model: InterventionModel, gains: Mapping[str, Gains], budget: int
) -> dict[str, dict[Place, int]]:
    """Task -> place -> rank, within a budget over all tasks."""
    costs = _cost_of_a_rank(model)
    flat = {(task, place): g for task, own in gains.items() for place, g in own.items()}
    ranks = allocate(flat, {key: costs[key[1][0]] for key in flat}, budget)
    return {task: {place: ranks[task, place] for place in own} for task, own in gains.items()}


def budget_in_numbers(budget: int | str | None, model: InterventionModel, tasks: int) -> int | None:
    """A budget in parameters: ``rank_4`` is what rank 4 takes at every solved place and task."""
    if not isinstance(budget, str):
        return budget
    costs = _cost_of_a_rank(model)
    per_task = sum(costs[site] for site, _ in solved_places(model))
    return int(budget.removeprefix("rank_")) * per_task * tasks


def _cost_of_a_rank(model: InterventionModel) -> dict[str, int]:
    """Site -> parameters that each rank of an edit takes there."""
    ones = {
        site: {str(placement.blocks[0]): 1}
        for site, placement in model.placements.items()
        if model.interventions[site].init == "regression"
    }
    edits = Edits(model.interventions, model.placements, ones, seed=0, task="")
    return {
        site: sum(parameter.numel() for parameter in function.parameters())
        for site, _, function in edits.places()
    }


class _Finished:
    """Finished tasks on disk: what they gain (``measured``), then their edits (``solved``).

    Args:
        folder: the run's; None: nothing is kept.
        tasks: how many tasks the run has.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: RunFolder | None, tasks: int, writes: bool):
        self._folder, self._tasks, self._writes = folder, tasks, writes
        self._count: Counter[str] = Counter()

    def once(self, kind: str, task: str, make: Callable[[str], Json]) -> Json:
        """A task's state on disk, or a new one, which is kept there."""
        if self._folder is None:
            return make(task)
        state = self._folder.load(f"{kind}-{task}")
        if state is None:
            state = make(task)
            if not self._writes or not self._folder.save(f"{kind}-{task}", state):
                return state
        self._count[kind] += 1
        tasks = f"{self._count[kind]} of {self._tasks} tasks are {kind}"
        self._folder.progress = f"{tasks}; the same command goes on from there"
        return state
