"""How the cost of distillation grows: with tasks, ranks, images a step, and images seen again.

    python benchmarks/scaling.py --size b32 --json scaling.json

Each line is ``distill`` from end to end (experts loaded, their features, the loop), in milliseconds
for one image of one task and step; the best of some turns in one process, in turns. Also: training
Surgery, the experts' features in hand. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import lightning as L
import torch
from distillation import PROJECTION, SIZES, Setting, machine
from rich.console import Console
from rich.table import Table

from fusion_bench_intervmerge.distillation.loop import distill

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="b32")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=("distillation", "surgery"), help="not the other")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
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
