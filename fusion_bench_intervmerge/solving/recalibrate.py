"""``recalibrate``: the maps of a calibrated encoder and the edits of its tasks, solved together.

Calibration solves a block's maps on what the blocks before them give without edits. With edits in
place they give something else, closer to the experts, for which these maps are not the best. So
from the first block to the last, both maps are solved anew for all tasks on the edited streams
(``calibrate``), then each task's edit of the block's output on what they give (``solve``).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import lightning as L
import torch

from ..calibration import CalibrationSettings, Streams, calibrate
from ..config import ConfigError
from ..data import Datasets, RunFolder
from ..encoders.base import ExpertLoaders, VisionTower
from ..model.model import InterventionModel
from .solve import solved_places
from .sweep import CLASS_WEIGHT, EditSolver

SITE = "block"


@torch.no_grad()
def recalibrate(
    model: InterventionModel,
    merged: VisionTower,
    pretrained: VisionTower,
    experts: ExpertLoaders,
    images: Datasets,
    settings: CalibrationSettings | None = None,
    *,
    edit_ridge: float | None = None,
    fabric: L.Fabric | None = None,
    states: RunFolder | None = None,
    **keywords: object,
) -> None:
    """Solve a model's maps and edits together, block by block; every edit keeps its rank.

    Args:
        model: on the calibrated encoder, its edits solved by ``solve``; both are replaced.
        merged, pretrained: the merge before it was calibrated, and what the experts come from.
        experts, images, settings, fabric, states, keywords: as in ``calibrate``.
        edit_ridge: of the edits' regressions, as ``solve``'s ``ridge``.

    Raises:
        ConfigError: as in ``calibrate``, or edits elsewhere than at block outputs.
        Interrupted: on Ctrl-C; the maps that were finished are kept, and the model is as it was.
    """
    check_sites(model.interventions)
    fabric, home = fabric or L.Fabric(devices=1, accelerator="auto"), model.tower.device
    weight = CLASS_WEIGHT * (model.tower.num_tokens - 1)
    places = solved_places(model)
    before = {
        (task, place): model.edits_of(task).at(*place) for task in experts for place in places
    }
    solvers = [
        EditSolver(
            model=model,
            task=task,
            fabric=fabric,
            ridge=edit_ridge,
            class_weight=weight,
            ranks={p: 0 if (old := before[task, p]) is None else old.rank for p in places},
        )
        for task in experts
    ]

    def edit(block: int, streams: Streams) -> None:
        for solver in solvers:
            if before.get((solver.task, (SITE, block))) is None:
                continue
            moments = solver.empty_moments(SITE)
            for _, state, target in streams.batches(solver.task):
                solver.add(moments, SITE, block, state, target - state)
            solver.place(SITE, block, moments)
            with model.for_task(solver.task):
                streams.states[solver.task].move(partial(model.tower.tapped, SITE, block))

    for task, place in before:
        model.edits_of(task).put(*place, None)
    try:
        model.to(fabric.device)
        calibrated = calibrate(
            merged,
            pretrained,
            experts,
            images,
            settings,
            fabric=fabric,
            states=states,
            after_block=edit,
            **keywords,
        )
    except BaseException:
        for (task, place), function in before.items():
            model.edits_of(task).put(*place, function)
        raise
    finally:
        model.to(home)
    model.tower.load_weights(calibrated.weights())


def check_sites(sites: Collection[str]) -> None:
    """Raise ConfigError unless edits are at block outputs alone."""
    if others := sorted(set(sites) - {SITE}):
        problem = f"edits at {', '.join(others)} cannot be solved together with the maps"
        raise ConfigError("recalibrate", problem, "false, or edits at block alone")
