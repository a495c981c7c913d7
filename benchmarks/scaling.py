"""How the cost of distillation grows: with tasks, ranks, images a step, and images seen again.

    python benchmarks/scaling.py --size b32 --json scaling.json
    python benchmarks/scaling.py --only tasks --blocks 3      # all else, at 8, 14 and 20 tasks

Each line is ``distill`` from end to end (experts loaded, their features, the loop), in milliseconds
for one image of one task and step; the best of some turns in one process, in turns. Also: training
Surgery, the experts' features in hand. Weights are random: speed does not depend on them.

With ``--only tasks``: seconds of processor time of calibration, of the closed form within a budget
and of fitting a router, against bare passes of every image through its expert and the merge; then
of one batch of 40 images of all tasks, against the merge alone, as a service encodes it; and the
peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from distillation import PROJECTION, SIZES, Setting, machine
from rich.console import Console
from rich.table import Table

from fusion_bench_intervmerge.calibration import calibrate
from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving.fit_router import fit_router
from fusion_bench_intervmerge.solving.solve import solve

BASE = {"tasks": 8, "rank": 1, "batch": 16, "unique": None, "steps": 1}
LINES: list[dict[str, Any]] = [
    *({"tasks": tasks} for tasks in (1, 8, 20)),
    *({"rank": rank} for rank in (4, 16, 64)),
    *({"batch": batch} for batch in (4, 64)),
    # the same number of image passes, of ever fewer images
    *({"tasks": 2, "steps": 8, "unique": unique} for unique in (128, 32, 16)),
]


def once(size: str, tasks: int, rank: int, batch: int, unique: int | None, steps: int) -> float:
    """Milliseconds an image, a task and a step."""
    setting = Setting(size, tasks, rank, False, torch.float32)
    side = SIZES[size]["image_size"]
    images = torch.randn(unique or steps * batch, 3, side, side)
    done = distill(
        setting.model(),
        setting.experts(),
        dict.fromkeys(setting.names, images),
        steps=steps,
        batch_size=batch,
        fabric=L.Fabric(accelerator="auto", devices=1),
    )
    return 1000 * sum(done.seconds.values()) / (steps * batch * tasks)


def surgery(size: str, steps: int = 1000) -> float:
    """Seconds that 1,000 steps of 16 images for eight tasks take, features in hand."""
    setting = Setting("tiny", 8, 1, False, torch.float32)
    width = PROJECTION[size]
    # The tower in front is not part of what is timed; only the width of its features is.
    tower: Any = setting.pretrained
    tower.projection, tower.projection_dim = torch.nn.Linear(tower.width, width, bias=False), width
    setting.sites = {"output": {"function": "surgery", "rank": 16}}
    done = distill(
        setting.model(),
        setting.experts(),
        dict.fromkeys(setting.names, torch.randn(512, 3, 32, 32)),
        steps=steps,
        fabric=L.Fabric(accelerator="auto", devices=1),
    )
    return done.seconds["steps"]


def many(size: str, tasks: int, images: int) -> dict[str, float]:
    """Seconds of processor time by what is done, numbers that are stored, and the peak in GiB."""
    setting = Setting(size, tasks, 1, False, torch.float32)
    side = SIZES[size]["image_size"]
    pixels = torch.randn(images, 3, side, side)
    given = setting.experts(), dict.fromkeys(setting.names, pixels)
    site = {"function": "nodireft", "tokens": "all", "init": "regression"}
    model = InterventionModel(setting.pretrained, setting.names, {"block": site})
    batch = torch.randn(40, 3, side, side)
    mixed = [setting.names[i % tasks] for i in range(40)]

    def bare() -> None:
        for load in setting.experts().values():
            load().features(pixels)
            model.tower.features(pixels)

    with torch.no_grad():
        model.tower.features(batch)  # the first pass of a process costs more
        taken = {
            "bare": seconds(bare),
            "calibration": seconds(lambda: calibrate(model.tower, setting.pretrained, *given)),
            "closed form": seconds(lambda: solve(model, *given, budget="rank_1")),
            "router": seconds(lambda: fit_router(model, given[1])),
            "merge": seconds(lambda: model.encode(batch)),
            "mixed": seconds(lambda: model.encode(batch, mixed)),
            "routed": seconds(lambda: model.encode(batch, "auto")),
        }
    extra = model.extra_parameters()
    taken |= {"edits": extra["total"], "router numbers": extra.get("router", 0)}
    return taken | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def show_many(options: argparse.Namespace) -> None:
    counts = (8, 14, 20)
    lines = [many(options.size, tasks, options.images) for tasks in counts]
    table = Table(
        "tasks", *map(str, counts), title=f"{options.size}, {options.blocks or 'all'} blocks"
    )
    for name in lines[0]:
        table.add_row(name, *(f"{line[name]:,.3g}" for line in lines))
    Console().print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            by_tasks = dict(zip(counts, lines, strict=True))
            json.dump({**machine(), "settings": vars(options), "tasks": by_tasks}, file, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="b32")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=("distillation", "surgery", "tasks"), help="of these")
    parser.add_argument("--blocks", type=int, help="fewer than the size has")
    parser.add_argument("--images", type=int, default=8, help="per task, for --only tasks")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    if arguments.blocks:
        SIZES[arguments.size]["num_hidden_layers"] = arguments.blocks
    if arguments.only == "tasks":
        return show_many(arguments)
    settings = [BASE | line for line in LINES if arguments.only != "surgery"]
    best = [float("inf")] * len(settings)
    for _ in range(arguments.turns):
        for i, setting in enumerate(settings):
            best[i] = min(best[i], once(arguments.size, **setting))
    turns = 0 if arguments.only == "distillation" else arguments.turns
    seconds = min((surgery(arguments.size) for _ in range(turns)), default=None)
    table = Table(title=f"{arguments.size}: distillation, end to end")
    for column in ("tasks", "rank", "images a step", "steps", "images a task", "ms an image"):
        table.add_column(column, justify="right")
    for setting, taken in zip(settings, best, strict=True):
        seen = setting["unique"] or setting["steps"] * setting["batch"]
        shown = [setting["tasks"], setting["rank"], setting["batch"], setting["steps"], seen]
        table.add_row(*map(str, shown), f"{taken:.1f}")
    console = Console()
    if settings:
        console.print(table)
    if seconds is not None:
        console.print(f"Surgery r=16, 8 tasks, 1,000 steps, features in hand: {seconds:.1f} s")
    if arguments.json:
        facts = {**machine(), "settings": vars(arguments)}
        lines = [{**s, "ms_per_image": t} for s, t in zip(settings, best, strict=True)]
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({**facts, "distillation": lines, "surgery_seconds": seconds}, file, indent=2)


if __name__ == "__main__":
    main()
