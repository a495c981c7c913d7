"""What a repaired model costs at inference, against the plain merged encoder.

    python benchmarks/serving.py --size b32 --json serving.json

Throughput of the same batch through the merged encoder alone, for one task, with a task an image
(eight tasks, mixed), and mixed after ``fold()``. In turns, in one process; the best of the turns.
And, with less noise, the time of a mixed batch's edits by themselves, as a share of the merged
encoder's. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from distillation import DEVICE, SIZES, machine, tower, wait
from rich.console import Console
from rich.table import Table

from fusion_bench_intervmerge.model.model import InterventionModel

EDITS = {
    "r=1": {"attention": {"rank": 1}},
    "r=16": {"attention": {"rank": 16}},
    "orthonormal, r=4": {"attention": {"function": "loreft", "rank": 4}},
    "SurgeryV2": {
        "block": {"function": "surgery", "rank": 16, "tokens": "all"},
        "output": {"function": "surgery", "rank": 16},
    },
}


def measure(
    size: str, tasks: int, batch: int, turns: int, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Images a second, by edits and way."""
    names = [f"task{i}" for i in range(tasks)]
    side = SIZES[size]["image_size"]
    images = torch.randn(batch, 3, side, side, device=DEVICE, dtype=dtype)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    mixed = [names[i % tasks] for i in order.tolist()]
    found: dict[str, dict[str, float]] = {}
    for label, edits in EDITS.items():
        model = InterventionModel(tower(size), names, edits).to(DEVICE, dtype)
        folded = model.fold()
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "merged": lambda m=model: m.tower.features(images),
            "one task": lambda m=model: m.encode(images, names[0]),
            "mixed": lambda m=model: m.encode(images, mixed),
            "mixed, folded": lambda m=folded: m.encode(images, mixed),
        }
        seconds = dict.fromkeys(ways, float("inf"))
        with torch.inference_mode():
            for turn in range(turns + 1):
                for name, run in ways.items():
                    wait()
                    started = time.perf_counter()
                    run()
                    wait()
                    if turn:  # the first turn warms up
                        seconds[name] = min(seconds[name], time.perf_counter() - started)
            alone = edits_alone(model, mixed)
        found[label] = {name: batch / taken for name, taken in seconds.items()}
        found[label]["edits alone"] = alone / seconds["merged"]
    return found


def edits_alone(model: InterventionModel, tasks: list[str]) -> float:
    """Seconds that the edits of a mixed batch take by themselves, tensors gathered and all."""
    tower = model.tower
    like = {"device": tower.device, "dtype": tower.dtype}
    states = torch.randn(len(tasks), tower.num_tokens, tower.width, **like)
    features = torch.randn(len(tasks), tower.projection_dim, **like)
    best = float("inf")
    for _ in range(20):
        with model.for_task(tasks, len(tasks)):
            wait()
            started = time.perf_counter()
            for site, placement in model.placements.items():
                for block in placement.blocks:
                    tower.tapped(site, block, features if site == "output" else states)
            wait()
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="b32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    found = measure(arguments.size, arguments.tasks, arguments.batch, arguments.turns, dtype)
    title = f"{arguments.size}, {arguments.tasks} tasks, {arguments.batch} images"
    table = Table(title=f"{title}: throughput, the merged encoder being 1")
    ways = list(next(iter(found.values())))[1:-1]
    for column in ("edits", "merged, images/s", *ways, "edits alone, share of its time"):
        table.add_column(column, justify="right")
    for label, rates in found.items():
        shares = [f"{rates[way] / rates['merged']:.2f}" for way in ways]
        alone = f"{rates['edits alone']:.1%}"
        table.add_row(label, f"{rates['merged']:.1f}", *shares, alone)
    Console().print(table)
    if arguments.json:
        facts = {**machine(), "settings": vars(arguments), "images_per_second": found}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)


if __name__ == "__main__":
    main()
