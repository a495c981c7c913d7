"""Every preset at real size: a few steps on ViT-B/32 and ViT-L/14, both towers, eight tasks.

    python benchmarks/real_sizes.py --json benchmarks/real_sizes.json

Weights and images are random: this shows that each preset runs at that size, how long a step takes,
and the peak memory of the process, on a GPU what it has allocated there (each run is one of its
own), not how well it does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from distillation import DEVICE, SIZES, Setting
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.encoders.convert import to_openclip
from fusion_bench_intervmerge.merging import CoefficientSettings, initial_coefficients, mix
from fusion_bench_intervmerge.model.model import InterventionModel

EDIT = "{attention: {function: noreft, rank: 1}}"
SURGERY = "{output: {function: surgery, rank: 16}}"
V2 = "{block: {function: surgery, rank: 16, tokens: all}, output: {function: surgery, rank: 16}}"
MINI = "{attention: {function: lobireft, part: {size: 64, shift: true}}}"
PRESETS = {  # interventions, loss, coefficients: as in config/method
    "intervmerge": (EDIT, "output", None),
    "intervmerge/mini": (MINI, "output", None),
    "intervmerge/ties_merging": (EDIT, "output", ("task", "ties", False)),
    "intervmerge/adamerging_task": (EDIT, "output", ("task", "plain", True)),
    "intervmerge/adamerging": (EDIT, "output", ("layer", "plain", True)),
    "surgery": (SURGERY, "output", None),
    "surgery_v2": (V2, "blocks", None),
}


def run(size: str, family: str, preset: str, steps: int, batch: int) -> dict[str, float]:
    """A few steps of one preset; seconds a step and GiB."""
    sites, loss, coefficients = PRESETS[preset]
    setting = Setting(size, 8, 1, coefficients is not None, torch.float32)
    mean = (0.5, 0.5, 0.5)
    convert = (lambda tower: to_openclip(tower, mean, mean)) if family == "openclip" else None

    def tower(name: str | None):
        found = setting.pretrained if name is None else setting.expert(name)
        return convert(found) if convert else found

    merged, mixture = tower(None), None
    if coefficients:
        granularity, kind, _ = coefficients
        start = initial_coefficients(0.3, 8, len(merged.mergeable()), granularity)
        settings = CoefficientSettings.read({"task_vectors": kind, "train": coefficients[2]}, "")
        mixture = mix(merged, map(tower, setting.names), start, settings)
    model = InterventionModel(
        merged, setting.names, OmegaConf.to_container(OmegaConf.create(sites))
    )
    started = time.perf_counter()
    done = distill(
        model,
        {name: lambda name=name: tower(name) for name in setting.names},
        dict.fromkeys(setting.names, setting.images[: batch * steps]),
        steps=steps,
        batch_size=batch,
        loss=loss,
        mixture=mixture if coefficients and coefficients[2] else None,
    )
    assert torch.isfinite(done.losses).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "seconds_per_step": done.seconds["steps"] / steps,
        "seconds": time.perf_counter() - started,
        "peak_gib": peak,
        "extra_parameters": model.extra_parameters()["total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["b32", "l14"], choices=SIZES)
    parser.add_argument("--families", nargs="*", default=["huggingface", "openclip"])
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="images a task and step")
    parser.add_argument("--json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(*arguments.one, arguments.steps, arguments.batch)))
        return
    table = Table(title=f"{arguments.steps} steps of {arguments.batch} images a task, 8 tasks")
    for column in ("size", "towers", "preset", "s a step", "peak GiB", "extra parameters"):
        table.add_column(column, justify="right")
    rows = []
    for size in arguments.sizes:
        for family in arguments.families:
            for preset in arguments.presets:
                command = [sys.executable, __file__, "--steps", str(arguments.steps)]
                command += ["--batch", str(arguments.batch), "--one", size, family, preset]
                shown = subprocess.run(command, capture_output=True, text=True)
                if shown.returncode:
                    raise SystemExit(f"{size} {family} {preset}:\n{shown.stderr[-2000:]}")
                row = json.loads(shown.stdout.splitlines()[-1])
                rows.append({"size": size, "towers": family, "preset": preset, **row})
                cells = (f"{row['seconds_per_step']:.1f}", f"{row['peak_gib']:.1f}")
                table.add_row(size, family, preset, *cells, f"{row['extra_parameters']:,}")
    Console().print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
