"""What solving costs: ``solve`` or ``calibrate`` against bare forward passes of the encoders.

    python benchmarks/solving.py --size b32 --json solving_b32.json
    python benchmarks/solving.py --calibrate --turns 1 --json calibration_b32.json

* bare: every image of every task once through its expert and once through the merged encoder,
  nothing else; the experts are loaded as ``solve`` loads them.
* ours: ``solve`` or ``calibrate``, all of it: reading, both encoders, sums, regressions, edits.

Both run in one process, in turns, on the GPU if there is one, and the median of the ratio counts.
On a CPU seconds are the process's own, of all threads.
Weights and images are random: speed does not depend on them. Peak memory is of a process of its own
(``--only``): on a CPU what it holds, on a GPU what it has allocated there.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time

import lightning as L
import torch
from distillation import DEVICE, SIZES, Setting, machine, wait

from fusion_bench_intervmerge.calibration import calibrate
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving.solve import solve

BATCH = 32
clock = time.perf_counter if DEVICE == "cuda" else time.process_time


class Images(torch.utils.data.Dataset):
    """Random images without a file behind them."""

    def __init__(self, count: int, side: int):
        self.pixels = torch.randn(count, 3, side, side)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def bare(setting: Setting, images: Images, model: InterventionModel) -> float:
    wait()
    started = clock()
    with torch.no_grad(), model.tower.in_dtype(setting.dtype):
        for name in setting.names:
            expert = setting.expert(name).to(setting.dtype)
            for batch in images.pixels.split(BATCH):
                batch = batch.to(DEVICE, setting.dtype)
                expert.features(batch)
                model.tower.features(batch)
    wait()
    return clock() - started


def ours(
    setting: Setting, images: Images, model: InterventionModel, options: argparse.Namespace
) -> float:
    wait()
    started = clock()
    datasets, experts = dict.fromkeys(setting.names, images), setting.experts()
    precision = "bf16-true" if options.bf16 else "32-true"
    more = {"fabric": L.Fabric(devices=1, precision=precision), "cache_gb": options.cache_gb}
    if options.calibrate:
        calibrate(model.tower, setting.pretrained, experts, datasets, **more)
    else:
        solve(model, experts, datasets, budget=options.budget, **more)
    wait()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="b32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--blocks", type=int, help="fewer than the size has")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cache-gb", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=("bare", "ours"))
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.blocks:
        SIZES[options.size]["num_hidden_layers"] = options.blocks
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    setting = Setting(options.size, options.tasks, 1, False, dtype)
    images = Images(options.images, SIZES[options.size]["image_size"])
    site = {"function": "nodireft", "tokens": "all", "init": "regression", "rank": options.rank}
    model = InterventionModel(copy.deepcopy(setting.pretrained), setting.names, {"block": site})
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(options.turns):
        if options.only != "ours":
            seconds["bare"].append(bare(setting, images, model))
        if options.only != "bare":
            seconds["ours"].append(ours(setting, images, model, options))
        print({way: [round(s, 2) for s in times] for way, times in seconds.items()}, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    result = {**machine(), **vars(options), "seconds": seconds, "peak_gib": round(peak, 2)}
    if not options.only:
        pairs = zip(seconds["ours"], seconds["bare"], strict=True)
        result["ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
    print(json.dumps(result))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
