"""A small real distillation in a process of its own, to be killed, resumed, or run as one of many.

Usage: distill_worker.py OUTPUT STATES STEPS [PAUSE [PROCESSES [KILL_AT,KILL_AT,...]]]

PAUSE: seconds before each step. With KILL_ATs the run is started over and over, and killed by
SIGKILL at a random moment once it has kept the state of that step; the last one is left alone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conftest import TASKS, hf_tower
from safetensors.torch import save_file

from fusion_bench_intervmerge.data import RunFolder
from fusion_bench_intervmerge.distillation import loop
from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.merging import mix
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving.recalibrate import recalibrate
from fusion_bench_intervmerge.solving.solve import solve
from fusion_bench_intervmerge.solving.sweep import Sweep


def main(output: Path, states: Path, steps: int, pause: float = 0.0, processes: int = 1) -> None:
    torch.set_num_threads(1)
    fabric = L.Fabric(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto"
    )
    fabric.launch()
    experts = {t: lambda s=s: hf_tower(s, noise=0.05) for s, t in enumerate(TASKS, start=1)}
    datasets = {
        task: torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for seed, task in enumerate(TASKS)
    }
    tower = hf_tower()
    start = torch.full((3, len(tower.mergeable())), 0.3)
    mixture = mix(tower, (experts[task]() for task in TASKS), start)
    model = InterventionModel(tower, TASKS, {"attention": {"function": "loreft", "rank": 2}})
    if pause:
        step = loop._Trainer._step

        def slow(*args):
            time.sleep(pause)
            return step(*args)

        loop._Trainer._step = slow  # so that a signal has a moment to hit
    done = distill(
        model,
        experts,
        datasets,
        steps=steps,
        batch_size=4,
        mixture=mixture,
        fabric=fabric,
        states=RunFolder(states, "the same run"),
        save_every=1,
    )
    solved = solved_features(fabric, experts, datasets)
    if fabric.is_global_zero:
        tensors = {n: p.detach().contiguous() for n, p in model.edits.named_parameters()}
        tensors |= {"coefficients": mixture.coefficients.detach(), "losses": done.losses}
        tensors["solved"] = solved
        tensors["resumed_at"] = torch.tensor(done.resumed_at)
        save_file(tensors, output)
        done.clear()


def solved_features(fabric: L.Fabric, experts: Any, datasets: Any) -> torch.Tensor:
    """Features of edits in closed form, and of maps and edits solved together; the sums behind
    them are of all processes' images.
    """
    Sweep._batch_size = 4  # so that each process has its share
    site = {"function": "nodireft", "rank": 2, "tokens": "all", "init": "regression"}
    model = InterventionModel(hf_tower(), TASKS, {"block": site})
    solution = solve(model, experts, datasets, fabric=fabric)
    found = [*solution.expert_features.values()]
    with torch.no_grad():
        found += [model.encode(datasets[task], task) for task in TASKS]
        recalibrate(model, hf_tower(), hf_tower(), experts, datasets, fabric=fabric)
        found += [model.encode(datasets[task], task) for task in TASKS]
    return torch.cat(found)


def kept_step(states: Path) -> int:
    try:
        return int(torch.load(states / "state-training.pt", weights_only=True)["step"])
    except FileNotFoundError:
        return 0


def torture(kills: list[int], states: Path, run: Callable[[], None]) -> None:
    """Fork before torch has started threads: one slow import serves all the victims."""
    for step in kills:
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        while kept_step(states) < step:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit(f"the run ended before step {step}")
            time.sleep(0.001)
        time.sleep(random.Random(step).random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    output, states, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    processes = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    if len(sys.argv) > 6:
        torture(
            [int(step) for step in sys.argv[6].split(",")],
            states,
            lambda: main(output, states, steps, pause),
        )
        pause = 0.0
    main(output, states, steps, pause, processes)
