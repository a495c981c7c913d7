"""Settings of a solution in closed form."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import lightning as L
import torch
from pydantic import Field
from torch import Tensor

from ..config import ConfigError, whole
from ..data import Datasets, RepairSettings, choose_images, computing_dtype, progress_bar
from ..distillation.states import Progress, StateFolder, interruptible
from ..encoders.base import ExpertLoaders, check_expert
from ..interventions.edits import Edits
from ..interventions.functions import function_class
from ..interventions.sites import SITES
from ..model.model import InterventionModel
from .sweep import Place, Sweep

# == solving.settings
# Settings of a solution in closed form.
_MOST = 10**12
_RANKS = Annotated[str, Field(pattern=r"^rank_[1-9]\d{0,5}$")]
_ALLOWED = f"null, or a whole number, 1 to {_MOST}, or rank_R: as many as rank R at every place"


class SolveSettings(RepairSettings):
    """What ``solve`` takes.

    Args:
        budget: extra parameters over all tasks, given out as ranks where they help most; for
            ``init: regression``. ``rank_4``: as many as rank 4 takes at every place, on any
            encoder.
            Null: every edit has the ``rank`` of its site.
    """

    budget: Annotated[
        Annotated[int, whole(1, _MOST)] | _RANKS | None, Field(description=_ALLOWED)
    ] = None


# == solving.budget
# A budget of extra parameters, given out rank by rank to where each buys most.
Key = TypeVar("Key", bound=Hashable)


def allocate(
    gains: Mapping[Key, Sequence[float]], costs: Mapping[Key, int], budget: int
) -> dict[Key, int]:
    """Ranks by place: the greedy choice of the largest gain a number, until nothing more fits.

    Gains fall from rank to rank, so at equal costs no other choice within the budget gains more.

    Args:
        gains: place -> what its first, second, ... rank gains; it ends at the first that gains
            nothing.
        costs: place -> numbers a rank takes.
        budget: numbers that may be spent.

    Returns:
        Key -> its rank, zero allowed; the ranks' numbers never exceed the budget.

    Raises:
        ConfigError: the budget buys not one rank.
    """
    if budget < min(costs.values()):
        allowed = f"{min(costs.values())} or more, the numbers of one rank"
        raise ConfigError("budget", f"{budget} numbers buy not one rank", allowed)
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


# == solving.solver
# ``solve``: edits in closed form for every task, at given ranks or within a budget.
log = logging.getLogger(__name__)


@dataclass
class Solution:
    """What ``solve`` did.

    Attributes:
        images: task -> dataset indices of the images seen.
        expert_features: task -> (images seen, projection_dim).
        gains: task -> what each further rank at each place takes off the mean squared distance of
            a row to the expert's, place by place as in ``solved_places``.
        seconds: wall-clock time, as ``solving``.
        states: what is kept on disk of the run, if anything.
    """

    images: dict[str, list[int]]
    expert_features: dict[str, Tensor]
    gains: dict[str, dict[Place, list[float]]]
    seconds: dict[str, float]
    states: StateFolder | None = None


@torch.no_grad()
def solve(
    model: InterventionModel,
    experts: ExpertLoaders,
    images: Datasets,
    settings: SolveSettings | None = None,
    *,
    ridge: float | None = None,
    class_weight: float | None = None,
    fabric: L.Fabric | None = None,
    states: StateFolder | None = None,
    **keywords: object,
) -> Solution:
    """Find the edits of sites whose ``init`` is ``regression``, in closed form, without labels.

    With a budget, its numbers go, rank by rank, to the (task, site, block) where the next one takes
    most off the distance to the expert, as a first solution at full rank tells. Images' states that
    do not fit in ``data.cache_gb`` lie in a temporary file.

    Args:
        model: the model, whose edits at these sites are replaced; other edits act as they are.
        experts: task -> function that loads the expert; one expert is in memory at a time.
        images: task -> dataset of pixel values, or of (pixel values, anything).
        settings: how, as the method's config file says it.
        ridge: of the regressions, in mean variances of what an edit reads (0 is for float64 alone,
            whose rounding it does not fit); None chooses one for each by generalised
            cross-validation.
        class_weight: how many patch tokens the class token counts for; half of them by default.
        fabric: device, precision and processes; one device by default.
        states: where to keep what is solved of a run that may be stopped, until ``clear``; None:
            nowhere.
        keywords: in place of ``settings`` its fields, and those of its ``data``: ``budget=6192``.

    Raises:
        ConfigError: no such site, a form without a closed solution, no images for a task, or a
            budget that buys not one rank.
        Interrupted: on Ctrl-C; the tasks that were finished are kept.
    """
    settings = SolveSettings.of(settings, keywords)
    data, budget = settings.data, budget_in_numbers(settings.budget, model, len(experts))
    fabric = fabric or L.Fabric(devices=1, accelerator="auto")
    for task in experts:
        model.edits_of(task)
        if task not in images:
            raise ConfigError("modelpool", f"no images for task {task!r}")
    chosen = {task: choose_images(task, len(images[task]), data, settings.seed) for task in experts}
    places = solved_places(model)
    states = states.of("solved") if states is not None else None
    finished = _Finished(states, places, writes=fabric.is_global_zero)
    started = time.perf_counter()
    home, dtype = model.tower.device, computing_dtype(fabric)
    weight = (model.tower.num_tokens - 1) / 2 if class_weight is None else class_weight

    def sweep(task: str, ranks: Mapping[Place, int] | None) -> Sweep:
        keys = [(task, index) for index in chosen[task]]
        expert = experts[task]()
        check_expert(task, expert, model.tower)
        done = Sweep(model, task, expert, places, fabric, ridge, weight, ranks)
        with model.for_task(task), expert.in_dtype(dtype), model.tower.in_dtype(dtype):
            done.run(images, keys, data.num_workers, data.cache_gb * 2**30, shown.update)
        return done

    blocks = model.tower.num_blocks * len(chosen) * (1 if budget is None else 2)
    try:
        model.to(fabric.device)
        with (
            interruptible("solving", states),
            progress_bar(fabric, "solving", blocks) as shown,
        ):
            same = {place: model.interventions[place[0]].rank for place in places}
            ranks = {task: same for task in experts}
            if budget is not None:
                for task in experts:
                    if not finished.has_gains(task):
                        finished.keep_gains(task, sweep(task, None).gains)
                        for place in places:  # at full rank they are large
                            model.edits_of(task).set_rank(*place, 0)
                ranks = share_out(model, {task: finished.gains(task) for task in experts}, budget)
            for task in experts:
                if not finished.restore(model, task):
                    done = sweep(task, ranks[task])
                    if budget is None:
                        finished.keep_gains(task, done.gains)
                    finished.keep_edits(model, task, done.features)
    finally:
        model.to(home)
    return Solution(
        images=chosen,
        expert_features={task: finished.features(task) for task in experts},
        gains={task: finished.gains(task) for task in experts},
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
            solvable = ", ".join(name for name, of in SITES.items() if of.closed_form)
            problem = "edits at this site are not solved in closed form"
            raise ConfigError(f"interventions.{site}.init", problem, f"regression at {solvable}")
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
        # an edit at a site takes in what the edits before it did
        for site in SITES
        if site in sites and SITES[site].in_blocks and block in model.placements[site].blocks
    ]
    return inside + [("output", 0)] * ("output" in sites)


def share_out(
    model: InterventionModel, gains: Mapping[str, Mapping[Place, Sequence[float]]], budget: int
) -> dict[str, dict[Place, int]]:
    """Task -> place -> rank, within a budget over all tasks.

    Raises:
        ConfigError: the budget buys not one rank.
    """
    costs = _cost_of_a_rank(model)
    flat = {(task, place): g for task, of in gains.items() for place, g in of.items()}
    ranks = allocate(flat, {key: costs[key[1][0]] for key in flat}, budget)
    return {task: {place: ranks[task, place] for place in of} for task, of in gains.items()}


def budget_in_numbers(budget: int | str | None, model: InterventionModel, tasks: int) -> int | None:
    """A budget in numbers: ``rank_4`` is what rank 4 at every solved place takes.

    Args:
        budget: as ``SolveSettings`` has it.
        model: whose edits are solved.
        tasks: how many are solved.
    """
    if not isinstance(budget, str):
        return budget
    costs = _cost_of_a_rank(model)
    of_one_task = sum(costs[site] for site, _ in solved_places(model))
    return int(budget.removeprefix("rank_")) * of_one_task * tasks


def _cost_of_a_rank(model: InterventionModel) -> dict[str, int]:
    """Site -> numbers that each rank of an edit takes there."""
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
    """What of a run is solved: in memory, and on disk where there is a state folder.

    Args:
        states: the run's states, read at once.
        places: of the run, in order.
        writes: whether this process is the one that writes states.
    """

    def __init__(self, states: StateFolder | None, places: Sequence[Place], writes: bool):
        self._states, self._places, self._writes = states, places, writes
        self._tensors = {} if states is None else states.tensors()
        if self._tensors:
            log.info("going on with what is solved already")

    def has_gains(self, task: str) -> bool:
        return f"gains.{task}.0" in self._tensors

    def gains(self, task: str) -> dict[Place, list[float]]:
        """What each further rank at each place gains."""
        return {
            place: self._tensors[f"gains.{task}.{index}"].tolist()
            for index, place in enumerate(self._places)
        }

    def features(self, task: str) -> Tensor:
        """The expert's image features (images, projection_dim)."""
        return self._tensors[f"features.{task}"]

    def restore(self, model: InterventionModel, task: str) -> bool:
        """Put a task's edits into the model, if they are solved."""
        if f"ranks.{task}" not in self._tensors:
            return False
        ranks = self._tensors[f"ranks.{task}"].tolist()
        for index, (place, rank) in enumerate(zip(self._places, ranks, strict=True)):
            function = model.edits_of(task).set_rank(*place, rank)
            if function is not None:
                start = f"edits.{task}.{index}."
                function.load({n: self._tensors[start + n] for n in function.tensors()})
        return True

    def keep_gains(self, task: str, gains: Mapping[Place, Sequence[float]]) -> None:
        for index, place in enumerate(self._places):
            self._tensors[f"gains.{task}.{index}"] = torch.tensor(gains[place], dtype=torch.float64)
        self._save()

    def keep_edits(self, model: InterventionModel, task: str, features: Tensor) -> None:
        ranks = model.edits_of(task).ranks()
        of_places = [ranks[site].get(str(block), 0) for site, block in self._places]
        self._tensors[f"ranks.{task}"] = torch.tensor(of_places)
        self._tensors[f"features.{task}"] = features
        for index, (site, block) in enumerate(self._places):
            function = model.edits_of(task).at(site, block)
            if function is not None:
                for name, tensor in function.tensors().items():
                    self._tensors[f"edits.{task}.{index}.{name}"] = tensor.detach().cpu()
        self._save()

    def _save(self) -> None:
        if self._states is not None and self._writes:
            self._states.save(Progress(len(self._tensors), torch.empty(0)), self._tensors)
