"""Merges of DINOv2-small and their repairs, a line of ``FOLDER/results.csv`` each.

    python tools/dinov2_pool.py FOLDER
    python tools/dinov2_evidence.py FOLDER --images 128 --methods closed_form_r4 intervmerge_r4

Heads are frozen class means of the pretrained encoder's features, and every method has the same.
What is in the file already is not run again, so that a stopped run goes on where it was. ``--images
0``: all test images, transductive; the repairs are found on images of the training split otherwise.
Encoders are computed in bf16, edits and the sums of the solvers in float32 and float64.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path

import lightning as L
import torch
from dinov2_pool import Pool
from torch import Tensor

from fusion_bench_intervmerge import (
    InterventionModel,
    calibrate,
    distill,
    fit_router,
    recalibrate,
    solve,
)
from fusion_bench_intervmerge.encoders.base import VisionTower
from fusion_bench_intervmerge.fusion.featcal import featcal
from fusion_bench_intervmerge.merging import CoefficientSettings, mix

PRECISIONS = {"bf16": ("bf16-true", torch.bfloat16), "fp32": ("32-true", torch.float32)}
COEFFICIENT = 0.3  # of Task Arithmetic and Ties-Merging
Encode = Callable[[Tensor, str], Tensor]

CLASS_TOKEN = {"attention": {"function": "noreft"}}
EVERY_TOKEN = {"block": {"function": "nodireft", "tokens": "all", "init": "regression"}}
LATE = {"block": {**EVERY_TOKEN["block"], "blocks": [9, 10, 11]}}
ROUTERS = {"router": CLASS_TOKEN, "router_late": LATE}  # they read where the first edit begins
SURGERY = {"output": {"function": "surgery", "rank": 16}}
EDITS = {  # method -> sites, budget, whether it is trained, whether the merge is calibrated
    "surgery": (SURGERY, None, True, False),
    "surgery_v2": (
        {"block": {"function": "surgery", "rank": 16, "tokens": "all"}, **SURGERY},
        *(None, True, False),
    ),
    **{
        f"intervmerge_r{rank}": (
            {"attention": {**CLASS_TOKEN["attention"], "rank": rank}},
            *(None, True, False),
        )
        for rank in (1, 4, 16)
    },
    "closed_form_r1": (EVERY_TOKEN, "rank_1", False, False),
    "closed_form_r4": (EVERY_TOKEN, "rank_4", False, False),
    "refined_r4": (EVERY_TOKEN, "rank_4", True, False),
    "calibrated_r0.25": (EVERY_TOKEN, 13842, False, True),
    "calibrated_late_r0.25": (LATE, 13842, False, True),
    "calibrated_r1": (EVERY_TOKEN, "rank_1", False, True),
    "calibrated_r4": (EVERY_TOKEN, "rank_4", False, True),
}
WEIGHTS = ("calibration", "featcal")  # no edits: better weights


class Bench:
    """The pool, its merges, and one way to run and score a method on them."""

    def __init__(self, folder: Path, steps: int, batch: int, precision: str):
        self.pool, self.steps, self.batch = Pool(folder), steps, batch
        name, self.dtype = PRECISIONS[precision]
        self.fabric = L.Fabric(accelerator="cpu", devices=1, precision=name)
        self.experts = {task: partial(self.pool.tower, task) for task in self.pool.tasks}
        self.merge, self.calibrated = cache(self._merge), lru_cache(1)(self._calibrated)

    def _merge(self, name: str) -> VisionTower:
        """FusionBench's formulas: the mean of the experts; theta0 + 0.3 sum of task vectors."""
        tower = self.pool.tower("pretrained")
        ties = "ties" if name == "ties_merging" else "plain"
        share = 1 / len(self.experts) if name == "weight_averaging" else COEFFICIENT
        settings = CoefficientSettings(train=False, task_vectors=ties)
        experts = (load() for load in self.experts.values())
        mix(tower, experts, torch.full((len(self.experts),), share), settings)
        return tower

    def score(self, tower: VisionTower, encode: Encode) -> dict[str, float]:
        """Accuracy by task; ``encode`` runs the tower, in the precision of the run."""
        with torch.no_grad(), tower.in_dtype(self.dtype), tower.cheap_to_train():
            return self.pool.accuracies(lambda images, task: encode(images.to(self.dtype), task))

    def encoder(self, tower: VisionTower) -> dict[str, float]:
        return self.score(tower, lambda images, _: tower.features(images))

    def own(self) -> dict[str, float]:
        """The experts, each on its own task."""
        towers = {task: load() for task, load in self.experts.items()}
        return {task: self.encoder(tower)[task] for task, tower in towers.items()}

    def found_on(self, count: int, seed: int) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Task -> images, and the settings that choose ``count`` of them; 0: all test images."""
        split = "train" if count else "test"
        data = {"split": split, "images": count or None, "batch_size": self.batch}
        return self.pool.images[split], {"seed": seed, "fabric": self.fabric, "data": data}

    def _calibrated(self, merge: str, count: int, seed: int) -> tuple[VisionTower, float]:
        """The calibrated merge, and process seconds."""
        images, more = self.found_on(count, seed)
        started, pretrained = time.process_time(), self.pool.tower("pretrained")
        tower = calibrate(self.merge(merge), pretrained, self.experts, images, **more)
        return tower, time.process_time() - started

    def repair(
        self, method: str, merge: str, count: int, seed: int
    ) -> tuple[dict[str, float], int, float]:
        """Accuracies, extra parameters over all tasks, process seconds of the repair."""
        images, more = self.found_on(count, seed)
        started, base = time.process_time(), self.merge(merge)
        if method == "featcal":
            tower = featcal(base, self.pool.tower("pretrained"), self.experts, images, **more)
            return self.encoder(tower), 0, time.process_time() - started
        if method == "calibration":
            tower, seconds = self.calibrated(merge, count, seed)
            return self.encoder(tower), 0, seconds
        sites, budget, trained, calibrated = EDITS[method]
        if calibrated:
            base, _ = self.calibrated(merge, count, seed)
            started = time.process_time()
        model = InterventionModel(copy.deepcopy(base), self.pool.tasks, sites, seed=seed)
        if sites in (EVERY_TOKEN, LATE):
            solve(model, self.experts, images, budget=budget, **more)
        if calibrated:
            plain, pretrained = self.merge(merge), self.pool.tower("pretrained")
            recalibrate(model, plain, pretrained, self.experts, images, **more)
        if trained:
            loss = "blocks" if method == "surgery_v2" else "output"
            distill(model, self.experts, images, steps=self.steps, loss=loss, **more)
        seconds = time.process_time() - started
        found = self.score(model.tower, lambda images, task: model.encode(images, task))
        return found, model.extra_parameters()["total"], seconds

    def routed(self, method: str, merge: str, count: int, seed: int) -> dict[str, float]:
        """Percent of the test images whose task a router finds, fitted on the repair's images."""
        base = copy.deepcopy(self.merge(merge))
        model = InterventionModel(base, self.pool.tasks, ROUTERS[method])
        images, _ = self.found_on(count, seed)
        fit_router(model, images, {"images": count or 512}, seed=seed)
        return {
            task: 100 * statistics.mean(found == task for found in model.route(test))
            for task, test in self.pool.images["test"].items()
        }


class Results:
    """The lines of a CSV file, each written once."""

    KEY = ("method", "merge", "images", "seed", "steps", "batch", "precision")

    def __init__(self, path: Path, tasks: list[str]):
        self.path, self.tasks = path, tasks
        self.fields = [*self.KEY, "parameters", "seconds", *tasks, "average"]

    def done(self) -> set[tuple[str, ...]]:
        """What the file has; several processes may write it."""
        if not self.path.is_file():
            return set()
        with self.path.open(newline="") as file:
            return {tuple(row[name] for name in self.KEY) for row in csv.DictReader(file)}

    def once(
        self, key: tuple[object, ...], run: Callable[[], tuple[dict[str, float], int, float]]
    ) -> None:
        key = tuple(map(str, key))
        if key in self.done():
            return
        found, parameters, seconds = run()
        average = round(statistics.mean(found.values()), 2)
        scores = [round(found[task], 1) for task in self.tasks]
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self.fields)
            writer.writerow([*key, parameters, round(seconds, 1), *scores, average])
        print(*key, average, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    known = [*ROUTERS, *WEIGHTS, *EDITS]
    parser.add_argument("--methods", nargs="*", choices=known, default=known, metavar="METHOD")
    parser.add_argument("--merge", default="task_arithmetic")
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of what is trained")
    parser.add_argument("--batch", type=int, default=16, help="images per task and step")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(1)  # other threads round differently, and gain little at this size
    bench = Bench(options.folder, options.steps, options.batch, options.precision)
    results = Results(options.folder / "results.csv", bench.pool.tasks)
    end = ("", "", options.precision)
    pretrained = bench.pool.tower("pretrained")
    results.once(("pretrained", "", "", "", *end), lambda: (bench.encoder(pretrained), 0, 0))
    results.once(("experts", "", "", "", *end), lambda: (bench.own(), 0, 0))
    for merge in ("weight_averaging", "task_arithmetic", "ties_merging"):
        key = ("merge", merge, "", "", *end)
        results.once(key, lambda merge=merge: (bench.encoder(bench.merge(merge)), 0, 0))
    for count in options.images:
        for seed in options.seeds:
            for method in options.methods:
                trained = method in EDITS and EDITS[method][2]
                steps = (options.steps, options.batch) if trained else ("", "")
                key = (method, options.merge, count, seed, *steps, options.precision)
                of = (method, options.merge, count, seed)
                run = partial(bench.repair, *of)
                if method in ROUTERS:
                    run = lambda of=of: (bench.routed(*of), 0, 0)  # noqa: E731
                results.once(key, run)


if __name__ == "__main__":
    main()
