"""Routers on an embedded pool: how often the task is told right, and what that does to accuracy.

    python benchmarks/routing.py                       # docs/data/rout*_tiny.csv, in minutes
    python benchmarks/routing.py --seeds 1 --images 32

Edits are solved in closed form on validation images (24,768 numbers on Task Arithmetic); routers
are fitted on some of the same images, another choice of them at each seed. All is measured on the
test split. Which router is shipped was decided by the column *validation*: fitted on 128 training
images a task, measured on the validation split.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import fusion_bench_config
import torch
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from fusion_bench.utils.instantiate_utils import set_print_function_call_permeanent
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from fusion_bench_intervmerge.data import DataSettings, choose_images
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.fusion.union import Corrupted, StreamSettings
from fusion_bench_intervmerge.merging import mix
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.model.router import (
    Reading,
    Router,
    RouterSettings,
    Statistics,
    log_density,
    stacked,
)
from fusion_bench_intervmerge.solving.solve import solve

SCALE = 100.0  # CLIP's logit scale: what the largest softmax is taken of


class Linear(Router):
    """log N(x; m, S) with one S of all tasks: their scatters' sum, 2% of it a sphere."""

    def scores(self, by_task: Mapping[str, Statistics], rows: Tensor) -> Tensor:
        count, mean, scatter = stacked(by_task)
        shared = scatter.sum(0) / (count - 1).sum().clamp_min(1)
        sphere = shared.diagonal().mean().clamp_min(1e-12) * torch.eye(rows.shape[1])
        factor = torch.linalg.cholesky(0.98 * shared + 0.02 * sphere)
        return log_density(factor[None], rows - mean)


class Means(Router):
    """cos(x, m), both seen from the middle of all images of the first fit."""

    def statistics(self, rows: Tensor) -> Statistics:
        return {"mean": rows.mean(0)}

    def scores(self, by_task: Mapping[str, Statistics], rows: Tensor) -> Tensor:
        means = torch.stack([task["mean"].double() for task in by_task.values()])
        return normalize(rows, dim=1) @ normalize(means, dim=1).T


class Nearest(Router):
    """-min |x - x_i| over the images x_i of a task, all of which are kept."""

    def statistics(self, rows: Tensor) -> Statistics:
        return {"rows": rows}

    def scores(self, by_task: Mapping[str, Statistics], rows: Tensor) -> Tensor:
        distances = [torch.cdist(rows, task["rows"].double()).amin(1) for task in by_task.values()]
        return -torch.stack(distances, dim=1)


class Subspace(Router):
    """-|x - m - V'V(x - m)|, V the 16 leading right singular vectors of a task's centred images."""

    def statistics(self, rows: Tensor) -> Statistics:
        _, _, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        return {"mean": rows.mean(0), "directions": axes[:16]}

    def scores(self, by_task: Mapping[str, Statistics], rows: Tensor) -> Tensor:
        residuals = []
        for task in by_task.values():
            moved, axes = rows - task["mean"], task["directions"].double()
            residuals.append((moved - moved @ axes.T @ axes).norm(dim=1))
        return -torch.stack(residuals, dim=1)


# The package has the Gaussian alone; the others are what it was chosen from.
OTHERS = (Linear, Means, Nearest, Subspace)
ROUTERS = {"gaussian": Router} | {kind.__name__.lower(): kind for kind in OTHERS}


def make_model(merged, tasks) -> InterventionModel:
    edit = {"function": "nodireft", "rank": 1, "tokens": "all", "init": "regression"}
    return InterventionModel(merged, tasks, {"block": edit})


def merge(pool: ExpertPool, weight: float):
    merged = pool.tower("_pretrained_")
    mix(merged, (pool.tower(t) for t in pool.tasks), torch.full((len(pool.tasks),), weight))
    return merged


def pixels(pool: ExpertPool, split: str, spoilt: str | None = None) -> dict[str, tuple]:
    """Task -> images and labels, all of a split."""
    found = {}
    for task in pool.tasks:
        data = pool.images(task, split)
        if spoilt is not None:
            items = Corrupted(data.dataset, task, StreamSettings(corruption=spoilt))
            data = type(data)(items, data.processor)
        images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
        found[task] = torch.stack(images), torch.tensor(labels)
    return found


def batched(call: Callable[[Tensor], Tensor], images: Tensor, size: int = 256) -> Tensor:
    return torch.cat([call(part) for part in images.split(size)])


class Seen:
    """A split under one condition: rows that routers read, and features by every task's edits."""

    def __init__(self, model: InterventionModel, data: dict[str, tuple], heads: dict[str, Tensor]):
        self.heads = heads
        images = torch.cat([part for part, _ in data.values()])
        self.labels = torch.cat([labels for _, labels in data.values()])
        sizes = torch.tensor([len(labels) for _, labels in data.values()])
        self.of = torch.arange(len(data)).repeat_interleave(sizes)
        self.rows = batched(model.router_rows, images)
        self.features = torch.stack([batched(partial(model.encode, task=t), images) for t in data])
        self.merged = batched(model.encode, images)

    def only(self, kept: Tensor) -> Seen:
        """The images where ``kept`` (images,) is true."""
        part = copy.copy(self)
        part.labels, part.of, part.rows = self.labels[kept], self.of[kept], self.rows[kept]
        part.features, part.merged = self.features[:, kept], self.merged[kept]
        return part

    def by(self, told: Tensor) -> dict[str, float]:
        """Accuracies with the features of the tasks told (images,)."""
        features = self.features[told, torch.arange(len(told))]
        own, union = self._classes(features, told)
        right = told == self.of
        return {
            "routing": float(right.double().mean()),
            "head": float((right & (own == self.labels)).double().mean()),
            "union": float((union == self._place()).double().mean()),
        }

    def plain(self, features: Tensor) -> dict[str, float]:
        """A model that is told nothing: accuracies of its features."""
        own, union = self._classes(features, self.of)
        return {
            "given": float((own == self.labels).double().mean()),
            "union": float((union == self._place()).double().mean()),
        }

    def _classes(self, features: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        logits = [normalize(features, dim=-1) @ head.T for head in self.heads.values()]
        best = torch.stack([part.argmax(dim=1) for part in logits], dim=1)
        return best.gather(1, told[:, None])[:, 0], torch.cat(logits, dim=1).argmax(dim=1)

    def _place(self) -> Tensor:
        sizes = torch.tensor([len(head) for head in self.heads.values()])
        return (sizes.cumsum(0) - sizes)[self.of] + self.labels

    def by_largest_logit(self) -> Tensor:
        """The task whose edits and head are surest: as many passes as there are tasks."""
        sure = [
            (SCALE * normalize(features, dim=-1) @ head.T).softmax(dim=1).amax(dim=1)
            for features, head in zip(self.features, self.heads.values(), strict=True)
        ]
        return torch.stack(sure, dim=1).argmax(dim=1)

    def confusion(self, told: Tensor) -> list[list[int]]:
        count = len(self.heads)
        return torch.bincount(self.of * count + told, minlength=count**2).view(count, -1).tolist()


def fit(name: str, rows: dict[str, Tensor], first: int | None = None) -> Router:
    """A router of rows; with ``first`` the later tasks are added when the first are there."""
    settings = RouterSettings()
    tasks = list(rows)
    reading = Reading.fit(torch.cat([rows[task] for task in tasks[:first]]), settings.dims)
    router = ROUTERS[name](reading, settings)
    for task in tasks:
        router.add(task, rows[task])
    return router


def told_by(router: Router, rows: Tensor) -> Tensor:
    return torch.tensor([router.tasks.index(task) for task in router(rows)])


def sample(seen: Seen, tasks: list[str], images: int, seed: int) -> dict[str, Tensor]:
    """Rows of some images a task, as ``fit_router`` would take them."""
    found = {}
    for index, task in enumerate(tasks):
        rows = seen.rows[seen.of == index]
        found[task] = rows[choose_images(task, len(rows), DataSettings(images=images), seed)]
    return found


def percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default="clip-vit-tiny_TA8")
    parser.add_argument("--budget", type=int, default=24768)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32, 128, 300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save-to", help="a JSON file for the numbers")
    options = parser.parse_args()

    set_print_function_call_permeanent(False)
    config = initialize_hydra_config(
        "fabric_model_fusion", [f"modelpool={options.pool}"], fusion_bench_config.__path__[0]
    )
    pool = ExpertPool(instantiate(config.modelpool))
    tasks, numbers = pool.tasks, {}
    heads = {task: zero_shot(pool, task) for task in tasks}
    model = make_model(merge(pool, 0.3), tasks)
    experts = {task: partial(pool.tower, task) for task in tasks}
    solve(
        model,
        experts,
        {t: pool.images(t, "validation") for t in tasks},
        budget=options.budget,
        data={"images": 512},
    )
    data = {s: pixels(pool, s) for s in ("train", "validation", "test")}
    # as many training images as may be needed; they are for the choice alone
    data["train"] = {task: (x[:600], y[:600]) for task, (x, y) in data["train"].items()}
    split = {name: Seen(model, part, heads) for name, part in data.items()}
    test = {"clean": split["test"]}
    for spoilt in ("noise", "blur"):
        test[spoilt] = Seen(model, pixels(pool, "test", spoilt), heads)

    # -- what each router tells ----------------------------------------------------------------
    seeds = range(options.seeds)
    told: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    chosen: dict[str, list[float]] = {}
    took: dict[tuple[str, int], list[float]] = {}
    for name in ROUTERS:
        for seed in seeds:
            router = fit(name, sample(split["train"], tasks, 128, seed))
            held_out = split["validation"]
            right = told_by(router, held_out.rows) == held_out.of
            chosen.setdefault(name, []).append(float(right.double().mean()))
            for images in options.images:
                rows = sample(split["validation"], tasks, images, seed)
                started = time.perf_counter()
                router = fit(name, rows)
                took.setdefault((name, images), []).append(time.perf_counter() - started)
                for condition, seen in test.items():
                    found = seen.by(told_by(router, seen.rows))
                    told.setdefault((name, images, condition), []).append(found)
    surest = {condition: seen.by(seen.by_largest_logit()) for condition, seen in test.items()}
    right = split["validation"].by_largest_logit() == split["validation"].of
    surest_validation = float(right.double().mean())

    print(f"### Share of images whose task is told right, %, {options.pool}")
    rows = [
        [name, percent(chosen[name])]
        + [percent([f["routing"] for f in told[name, n, "clean"]]) for n in options.images]
        + [
            percent([f["routing"] for f in told[name, options.images[-2:][0], c]])
            for c in ("noise", "blur")
        ]
        for name in ROUTERS
    ]
    rows.append(
        ["logit", percent([surest_validation])]
        + [percent([surest["clean"]["routing"]])] * len(options.images)
        + [percent([surest[c]["routing"]]) for c in ("noise", "blur")]
    )
    counts = [f"{n} images" for n in options.images]
    table(["router", "validation", *counts, "noise", "blur"], rows)

    best = max(ROUTERS, key=lambda name: statistics.mean(chosen[name]))
    print(f"\n### Accuracy, %, router: {best}")
    rows = []
    for condition, seen in test.items():
        given = seen.by(seen.of)["head"]
        rows.append([condition, "given", percent([given]), percent([seen.by(seen.of)["union"]])])
        for images in options.images:
            found = told[best, images, condition]
            numbers_of = [percent([f[k] for f in found]) for k in ("head", "union")]
            rows.append([condition, f"routed, {images} images", *numbers_of])
        found = surest[condition]
        rows.append(
            [condition, "routed by logit"] + [percent([found[k]]) for k in ("head", "union")]
        )
        plain = seen.plain(seen.merged)
        rows.append([condition, "Task Arithmetic", "", percent([plain["union"]])])
        numbers[condition] = {"given": given, "plain": plain, "logit": found}
    encoders = {"Weight Averaging": merge(pool, 1 / len(tasks)), "pretrained": merge(pool, 0.0)}
    for condition, seen in test.items():
        part = data["test"] if condition == "clean" else pixels(pool, "test", condition)
        images = torch.cat([images for images, _ in part.values()])
        for name, encoder in encoders.items():
            plain = seen.plain(batched(encoder.features, images))
            rows.append([condition, name, "", percent([plain["union"]])])
            numbers[condition][name] = plain
    table(
        ["images", "task", "head of that task", "union of heads"],
        sorted(rows, key=lambda r: list(test).index(r[0])),
    )

    # -- where it goes wrong ---------------------------------------------------------------------
    router = fit(best, sample(split["validation"], tasks, 128, 0))
    confusion = test["clean"].confusion(told_by(router, test["clean"].rows))
    print("\n### Which task is taken for which, 128 images, seed 0")
    table(["true", *tasks], [[t, *map(str, row)] for t, row in zip(tasks, confusion, strict=True)])

    # -- the same without tasks that look like others ----------------------------------------------
    rows = []
    for out in ([], ["colours"], ["colours", "textures"]):
        kept = torch.tensor([task not in out for task in tasks])[test["clean"].of]
        right, given = [], []
        for seed in seeds:
            fewer = fit(best, sample(split["validation"], tasks, 128, seed))
            for task in out:
                fewer.drop(task)
            seen = test["clean"].only(kept)
            found = torch.tensor([tasks.index(task) for task in fewer(seen.rows) if task])
            right.append(seen.by(found))
            given.append(seen.by(seen.of)["head"])
        numbers_of = [percent([found[k] for found in right]) for k in ("routing", "head")]
        rows.append([", ".join(out) or "none", percent(given[:1]), *numbers_of])
    table(["left out", "given", "task told right", "routed, 128 images"], rows)

    # -- tasks that come later, images of none ---------------------------------------------------
    later = fit(best, sample(split["validation"], tasks, 128, 0), first=len(tasks) - 2)
    at_once, joined = (
        test["clean"].by(told_by(r, test["clean"].rows))["routing"] for r in (router, later)
    )
    print(f"\nall tasks at once: {at_once:.1%}; the last two added later: {joined:.1%}")
    rows = []
    for threshold in (0.01, 0.05, 0.1):
        own, strange = [], []
        for out in tasks:
            others = {
                t: r for t, r in sample(split["validation"], tasks, 300, 0).items() if t != out
            }
            partly = fit(best, others)
            partly.threshold = threshold
            for index, task in enumerate(tasks):
                refused = partly(test["clean"].rows[test["clean"].of == index]).count(None)
                (strange if task == out else own).append(refused / 480)
        rows.append(
            [
                f"{threshold:.2f}",
                percent([statistics.mean(own)]),
                percent([statistics.mean(strange)]),
            ]
        )
    table(["threshold", "known refused, %", "unknown refused, %"], rows)

    # -- what it costs -----------------------------------------------------------------------------
    images = torch.cat([images[:16] for images, _ in data["test"].values()])
    model.router = router
    ways = {"told": model.route(images), "auto": "auto"}
    works, times = {}, {name: float("inf") for name in ways}
    for name, task in ways.items():
        with FlopCounterMode(display=False) as counter:
            model.encode(images, task)
        works[name] = counter.get_total_flops()
    for name in 40 * list(ways):  # in turns, and the quickest: others may be at work as well
        started = time.perf_counter()
        model.encode(images, ways[name])
        times[name] = min(times[name], time.perf_counter() - started)
    print(
        f"\npasses an image: {works['auto'] / works['told']:.3f} by operations, "
        f"{times['auto'] / times['told']:.3f} by the clock, 128 images of {len(tasks)} tasks\n"
        f"numbers: {router.count():,}; seconds to fit on 128 images a task, their passes aside: "
        f"{statistics.mean(took[best, 128 if 128 in options.images else options.images[-1]]):.2f}"
    )
    if options.save_to:
        numbers |= {
            "tasks": tasks,
            "confusion": confusion,
            "validation": chosen,
            "told": {f"{n}/{i}/{c}": found for (n, i, c), found in told.items()},
        }
        Path(options.save_to).write_text(json.dumps(numbers, indent=1) + "\n")


def zero_shot(pool: ExpertPool, task: str) -> Tensor:
    """The task's zero-shot weights (classes, projection_dim)."""
    head = pool.head(task)
    assert head is not None
    size = pool.tower("_pretrained_").projection_dim
    return head(torch.eye(size)).T


if __name__ == "__main__":
    main()
