"""Run folders as ``fusion_bench`` leaves them, with invented numbers."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ["digits", "letters", "shapes", "counting", "positions", "colours", "gratings", "textures"]
# name -> (extra parameters, share of the gap that it closes)
METHODS = {
    "surgery_r16": (16384, 0.31),
    "intervmerge_r1": (6240, 0.36),
    "intervmerge_r4": (24768, 0.47),
}
MERGES = {
    "task_arithmetic": 0.55,
    "simple_average": 0.47,
    "ties_merging": 0.57,
    "adamerging": 0.66,
    "regmean": 0.62,
}


def evaluated(tasks: Sequence[str], mean: float, spread: float, seed: str) -> dict[str, Any]:
    """What a task pool reports of one model, the tasks' accuracies around ``mean``."""
    draw = random.Random(seed)
    offsets = [spread * draw.uniform(-1, 1) for _ in tasks]
    found = {
        task: {"accuracy": min(0.999, max(0.02, mean + o)), "loss": 1 - mean}
        for task, o in zip(tasks, offsets, strict=True)
    }
    average = sum(v["accuracy"] for v in found.values()) / len(tasks)
    info = {"trainable_params": 24768, "all_params": 342464, "trainable_percentage": 0.07}
    return {"model_info": info, **found, "average": {"accuracy": average, "loss": 1 - mean}}


def comparison(
    folder: Path,
    bases: Sequence[str] = ("task_arithmetic",),
    methods: dict[str, tuple[int, float]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] = TASKS,
    losses: bool = False,
    references: bool = True,
) -> Path:
    """A folder of ``method=intervmerge/compare``."""
    methods = METHODS if methods is None else methods
    report: dict[str, Any] = {}
    about: dict[str, Any] = {}
    experts, level = 0.93, {t: random.Random(t).uniform(-0.12, 0.06) for t in tasks}

    def add(name: str, mean: float, **facts: Any) -> None:
        found = evaluated(tasks, mean, 0.012, name)
        for task, shift in level.items():
            hard = shift * (1 if mean < 0.9 else 0.3)
            found[task]["accuracy"] = min(0.999, max(0.02, found[task]["accuracy"] + hard))
        found["average"]["accuracy"] = sum(found[t]["accuracy"] for t in tasks) / len(tasks)
        report[name], about[name] = found, facts

    if references:
        add("pretrained", 0.16, kind="pretrained")
        add("experts", experts, kind="experts")
    for base in bases:
        merged = MERGES[base]
        add(base, merged, kind="merge", base=base, extra_parameters=0, seconds=0.41)
        for method, (extra, share) in methods.items():
            for seed in seeds:
                noise = random.Random(f"{base}{method}{seed}").gauss(0, 0.012)
                add(
                    f"{base}/{method}/seed{seed}",
                    merged + share * (experts - merged) + noise,
                    kind="repair",
                    base=base,
                    method=method,
                    seed=seed,
                    extra_parameters=extra,
                    seconds=61.3 + seed,
                    final_loss=0.5,
                    losses=curves(tasks, 200, seed, 1 - share) if losses else {},
                    images=[
                        {"split": "test", "steps": 200, "batch_size": 16, "seed": seed}
                        | {"transductive": True}
                    ],
                    **settings(method),
                )
    return write(folder, report, about, tasks, [
        "method=intervmerge/compare", "modelpool=clip-vit-tiny_TA8", "taskpool=clip-vit-tiny_TA8",
    ])  # fmt: skip


def single(
    folder: Path, rank: int = 4, seed: int = 0, mean: float = 0.72, tasks: Sequence[str] = TASKS
) -> Path:
    """A folder of ``method=intervmerge``."""
    report = evaluated(tasks, mean, 0.1, f"single{seed}")
    draw = random.Random(seed)
    facts = {
        "kind": "repair",
        "base": "task_arithmetic",
        "method": f"intervmerge_r{rank}",
        "rank": rank,
        "seed": seed,
        "images": [
            {"split": "validation", "fraction": 0.1, "steps": 200, "batch_size": 16, "seed": seed}
        ],
        "extra_parameters": 6192 * rank,
        "seconds": 150.6,
        "features": {
            task: {
                "bias_before": 0.75 + 0.1 * draw.random(),
                "bias_after": 0.3 + 0.25 * draw.random(),
                "agreement_before": 0.4 + 0.2 * draw.random(),
                "agreement_after": 0.65 + 0.3 * draw.random(),
            }
            for task in tasks
        },
        "losses": curves(tasks, 200, seed, 0.5),
    }
    overrides = [
        "method=intervmerge",
        f"method.interventions.attention.rank={rank}",
        "method.data={split: validation, fraction: 0.1}",
        "modelpool=clip-vit-tiny_TA8",
    ]
    model = f"task_arithmetic/intervmerge_r{rank}/seed{seed}"
    return write(folder, report, {model: facts}, tasks, overrides)


def study(folder: Path, about: dict[str, Any], axes: dict[str, list[str]]) -> Path:
    """A grid of runs on two tasks with their references; one more run is not finished."""
    tasks = TASKS[:2]
    comparison(folder / "references", methods={}, tasks=tasks)
    jobs = [{"folder": "references", "labels": {"also": "references"}}]
    for values in itertools.product(*axes.values()):
        labels = dict(zip(axes, values, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in labels.items())
        size = int(values[0][-1]) if values[0][-2:-1] in "= " else 4
        seed = int(labels.get("seed", labels.get("method.seed", "0")))
        single(folder / name, size, seed, 0.6 + 0.1 * random.Random(name).random(), tasks)
        jobs.append({"folder": name, "labels": labels})
    jobs.append({"folder": "unfinished", "labels": labels})
    (folder / "study.json").write_text(json.dumps({"study": about, "jobs": jobs}))
    return folder


def settings(method: str) -> dict[str, Any]:
    """A method's rank, or its budget, of the name that it has here."""
    size = method.rpartition("_")[2]
    return {("rank", "budget")[size[:1] == "b"]: int(size[1:])} if size[1:].isdigit() else {}


def curves(tasks: Sequence[str], steps: int, seed: int, floor: float) -> dict[str, list[float]]:
    """A loss a task that falls towards ``floor``."""
    draw = random.Random(seed)
    ends = {task: floor * draw.uniform(0.75, 1.2) for task in tasks}
    return {
        task: [end + (0.9 - end) * math.exp(-i / 45) + draw.gauss(0, 0.03) for i in range(steps)]
        for task, end in ends.items()
    }


def analysis(
    folder: Path,
    blocks: int = 4,
    points: int = 80,
    merges: Sequence[str] = ("task_arithmetic",),
    labels: bool = True,
    tasks: Sequence[str] = TASKS[:3],
) -> Path:
    """Adds ``analysis.json`` to a run folder."""
    draw = random.Random(3)
    models = {"merged": 1.0, "surgery_r16": 0.9, "intervmerge_r4": 0.55}
    shares = ("agreement", "accuracy") if labels else ("agreement",)

    def edits(model: str) -> list[dict[str, Any]]:
        places = [("output", None)] if model == "surgery_r16" else [
            ("attention", block) for block in range(blocks)
        ]  # fmt: skip
        return [
            {"site": site, "block": block, "bias": 0.2 * draw.random()}
            | {share: -0.2 * draw.random() for share in shares}
            for site, block in places
        ]

    def cloud(size: float) -> list[list[float]]:
        return [[draw.gauss(3 * (i % 3), 0.5 + 0.3 * size), draw.gauss(2 * (i % 2), 0.6)]
                for i in range(points)]  # fmt: skip

    def each(value: Any) -> dict[str, Any]:
        return {task: {model: value(size) for model, size in models.items()} for task in tasks}

    found = {
        "agreement": each(lambda size: 1 - 0.5 * size),
        "bias": each(lambda size: {
            "blocks": [size * (0.1 + 0.2 * b + 0.05 * draw.random()) for b in range(blocks)],
            "features": size,
        }),
        "stitching": each(lambda size: {
            share: [0.92 - size * 0.09 * b for b in range(blocks + 1)] for share in shares
        }),
        "contributions": {
            task: {model: edits(model) for model in models if model != "merged"} for task in tasks
        },
        "embeddings": {
            task: {model: {"pca": cloud(size), "tsne": cloud(size)}
                   for model, size in (("expert", 0.2), *models.items())}
            for task in tasks
        },
    }  # fmt: skip
    about = {"images": points, "split": "test", "tasks": list(tasks)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(
        json.dumps({**about, "merges": dict.fromkeys(merges, found)})
    )
    return folder


def write(
    folder: Path,
    report: dict[str, Any],
    models: dict[str, Any],
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
) -> Path:
    """A run folder with these accuracies and models, and the files that Hydra leaves beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program_report.json").write_text(json.dumps(report))
    results = {"version": 1, "tasks": list(tasks), "models": models}
    (folder / "intervmerge.json").write_text(json.dumps(results))
    lines = "".join(f"- '{override}'\n" for override in overrides)
    (folder / "overrides.yaml").write_text(lines)
    (folder / "config.yaml").write_text("method:\n  steps: 200 # <of each task>\nseed: null\n")
    (folder / "hydra.yaml").write_text(
        "hydra:\n  job: {config_name: fabric_model_fusion}\n  runtime:\n    choices:\n"
        "      method: intervmerge\n      method@method.base: task_arithmetic\n"
    )
    return folder
