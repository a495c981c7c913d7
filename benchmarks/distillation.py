"""What a distillation step costs: the published loop, ours, and the floor, on the same images.

    python benchmarks/distillation.py --size b32 --tasks 8 --json b32.json

* naive: the algorithm as published. One task a step; the student's weights are built anew from the
  pretrained weights and all task vectors, the expert's too; then expert, student, backward, Adam.
  As published, gradients flow back to the coefficients and to every copy of the weights, where they
  add up unused, whether coefficients are trained or not.
* ours: ``distill``, all of it: reading, the experts' features, the loop.
* floor: what the arithmetic costs: one forward pass of the expert, one forward and backward pass of
  the frozen encoder with its edits, and nothing else.

All three run in one process, in turns, on the GPU if there is one, and the median counts. Weights
are random: speed does not depend on them. Peak memory is of a process of its own for each
(``--memory``): on a CPU what it holds, on a GPU what it has allocated there.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.encoders.base import VisionTower
from fusion_bench_intervmerge.merging import Mixture, task_vector
from fusion_bench_intervmerge.model.model import InterventionModel

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
    | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    "b32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "image_size": 224, "patch_size": 32},
    "l14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "image_size": 224, "patch_size": 14},
}
PROJECTION = {"tiny": 64, "b32": 512, "l14": 768}
BATCH = 16
# Test images of the paper's eight data sets (SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST,
# DTD), of which its protocol draws 16,000 each: small sets are seen again and again.
PAPER_IMAGES = (19850, 8041, 6300, 2700, 26032, 12630, 10000, 1880)
PAPER_DRAWS = 16000
WAYS = ("naive", "ours", "floor")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Until the device has done all that it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def machine() -> dict[str, object]:
    """What the numbers hang on, for the JSON file."""
    facts: dict[str, object] = {"torch": torch.__version__, "machine": platform.machine()}
    if DEVICE == "cuda":
        return {**facts, "card": torch.cuda.get_device_name()}
    return {**facts, "threads": torch.get_num_threads()}


def tower(size: str, seed: int = 0) -> VisionTower:
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES[size])).eval()
    return as_tower(model, nn.Linear(SIZES[size]["hidden_size"], PROJECTION[size], bias=False))


class Setting:
    """Random encoders and images; experts differ from the pretrained one by a little noise."""

    def __init__(self, size: str, tasks: int, rank: int, trained: bool, dtype: torch.dtype):
        self.names = [f"task{i}" for i in range(tasks)]
        self.trained, self.dtype = trained, dtype
        self.pretrained = tower(size).to(DEVICE)
        self.theta0 = {n: p.detach().clone() for n, p in self.pretrained.mergeable().items()}
        self.seeds = {name: i for i, name in enumerate(self.names)}
        side = SIZES[size]["image_size"]
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(2 * BATCH, 3, side, side, generator=generator)
        self.sites = {"attention": {"rank": rank}}

    def expert(self, name: str) -> VisionTower:
        expert = copy.deepcopy(self.pretrained)
        generator = torch.Generator().manual_seed(self.seeds[name])
        with torch.no_grad():
            for parameter in expert.mergeable().values():
                # cheap noise: drawing millions of normals would be most of the time
                parameter.add_(1e-3 * torch.rand(1, generator=generator).item())
        return expert

    def experts(self) -> dict[str, Callable[[], VisionTower]]:
        return {name: partial(self.expert, name) for name in self.names}

    def vectors(self):
        for name in self.names:
            yield task_vector(self.expert(name).mergeable(), self.theta0)

    def model(self) -> InterventionModel:
        return InterventionModel(copy.deepcopy(self.pretrained), self.names, self.sites)

    def coefficients(self) -> torch.Tensor:
        return torch.full((len(self.names), len(self.theta0)), 0.3, device=DEVICE)


def naive(setting: Setting) -> Callable[[], float]:
    """Seconds an image of the published loop; each call is a step of one task."""
    vectors = [setting.theta0, *setting.vectors()]
    copies = [[tensor.clone() for tensor in vector.values()] for vector in vectors]
    for copy_ in copies:
        for tensor in copy_:
            tensor.requires_grad_()
    model = setting.model()
    coefficients = setting.coefficients().requires_grad_()
    moving = [coefficients] if setting.trained else []
    optimizer = torch.optim.Adam([*model.edits.parameters(), *moving], lr=1e-3)
    names = list(model.tower.mergeable())
    pretrained = torch.ones(1, len(names), device=DEVICE)  # its coefficient is always 1
    one_hot = torch.eye(len(setting.names), device=DEVICE)[:, :, None].expand(-1, -1, len(names))
    turn = 0

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = model.tower

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.tower.features(images)

    features = Features()

    def weights(used: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = torch.cat([pretrained, used])
        return {
            f"tower.model.{name}": sum(scales[c, i] * copies[c][i] for c in range(len(copies)))
            for i, name in enumerate(names)
        }

    def step() -> float:
        nonlocal turn
        task, turn = turn % len(setting.names), turn + 1
        wait()
        started = time.perf_counter()
        images = setting.images[:BATCH].to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            student = weights(coefficients.clamp(0, 1))
            with model.for_task(setting.names[task]):
                own = torch.func.functional_call(features, student, (images,))
            with torch.no_grad(), model.for_task(None):
                expert_weights = weights(one_hot[task])
                expert = torch.func.functional_call(features, expert_weights, (images,))
        loss = (own.float() - expert.float()).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()
        return (time.perf_counter() - started) / BATCH

    return step


def ours(
    setting: Setting, steps: int, compile: bool = False, seen_again: bool = False
) -> Callable[[], float]:
    """Seconds an image of ``distill``, loading the experts and all; each call is a short run.

    Every image is new, as in a large data set; with ``seen_again`` as large a share of them as in
    the paper's protocol, task by task.
    """
    mixture = None
    if setting.trained:
        mixture = Mixture(
            setting.theta0, setting.vectors(), setting.coefficients(), dtype=setting.dtype
        )
    precision = "bf16-true" if setting.dtype == torch.bfloat16 else "32-true"

    def run() -> float:
        drawn = setting.images[torch.arange(steps * BATCH) % len(setting.images)]
        shares = [min(1.0, size / PAPER_DRAWS) if seen_again else 1.0 for size in PAPER_IMAGES]
        images = {
            name: drawn[: round(len(drawn) * shares[i % len(shares)])]
            for i, name in enumerate(setting.names)
        }
        done = distill(
            setting.model(),
            setting.experts(),
            images,
            steps=steps,
            batch_size=BATCH,
            mixture=mixture,
            compile=compile,
            fabric=L.Fabric(accelerator="auto", devices=1, precision=precision),
        )
        return sum(done.seconds.values()) / (steps * BATCH * len(setting.names))

    return run


def floor(setting: Setting) -> Callable[[], float]:
    """Seconds an image of a bare expert pass and a bare forward and backward pass."""
    model = setting.model()
    expert = setting.expert(setting.names[0])
    images = setting.images[:BATCH].to(DEVICE, setting.dtype)
    model.tower.to(setting.dtype)
    expert.to(setting.dtype)
    for parameter in model.tower.mergeable().values():
        parameter.requires_grad_(setting.trained)

    def step() -> float:
        wait()
        started = time.perf_counter()
        with torch.no_grad():
            target = expert.features(images)
        with model.for_task(setting.names[0]):
            features = model.tower.features(images)
        (features.float() - target.float()).abs().mean().backward()
        wait()
        elapsed = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return elapsed / BATCH

    return step


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds an image of each way: the median over several turns."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    setting = Setting(arguments.size, arguments.tasks, arguments.rank, arguments.trained, dtype)
    ways = {
        "naive": lambda: naive(setting),
        "ours": lambda: ours(setting, arguments.steps, arguments.compile, arguments.seen_again),
        "floor": lambda: floor(setting),
    }
    chosen = {name: make() for name, make in ways.items() if arguments.only in (None, name)}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(arguments.turns + 1):
        for name, run in chosen.items():
            # A run of ours has several steps of its own.
            taken = [run() for _ in range(1 if name == "ours" else arguments.steps)]
            if turn or arguments.only:  # the first turn warms up
                seconds[name].extend(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def profile(arguments: argparse.Namespace, shown: int = 12) -> Table:
    """Which operators a run of ours spends its time in."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    setting = Setting(arguments.size, arguments.tasks, arguments.rank, arguments.trained, dtype)
    run = ours(setting, arguments.steps, arguments.compile, arguments.seen_again)
    with torch.profiler.profile() as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table(title="where ours spends its time")
    for column in ("operator", "calls", "share of time"):
        table.add_column(column, justify="right")
    for event in events[:shown]:
        table.add_row(event.key, str(event.count), f"{event.self_cpu_time_total / total:.1%}")
    return table


def peak_gib(way: str) -> float:
    """Peak resident memory of one way, in a process of its own."""
    given = [argument for argument in sys.argv[1:] if argument != "--memory"]
    command = [sys.executable, __file__, *given, "--only", way, "--turns", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(shown.splitlines()[-1])["peak_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="b32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps of each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--trained", action="store_true", help="train layer-wise coefficients")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks")
    parser.add_argument(
        "--seen-again", action="store_true", help="images repeat as in the paper's protocol"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--profile", action="store_true", help="only where ours spends its time")
    parser.add_argument("--json", help="where to write the numbers")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.profile:
        Console().print(profile(arguments))
        return
    # Memory first: a process that this one starts takes over its peak.
    peaks = {way: peak_gib(way) for way in WAYS} if arguments.memory else {}
    seconds = measure(arguments)
    if arguments.only:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps({"peak_gib": peak}))
        return
    rows = {
        name: {
            "seconds_per_image": taken,
            "faster_than_naive": seconds["naive"] / taken,
            "times_the_floor": taken / seconds["floor"],
            **({"peak_gib": peaks[name]} if peaks else {}),
        }
        for name, taken in seconds.items()
    }
    coefficients = "trained" if arguments.trained else "frozen"
    title = f"{arguments.size}, {arguments.tasks} tasks, rank {arguments.rank}, {coefficients}"
    table = Table(title=f"{title}, {'bf16' if arguments.bf16 else 'fp32'}")
    for column in ("", "ms an image", "faster than naive", "times the floor", "peak GiB"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{1000 * row['seconds_per_image']:.1f}",
            f"{row['faster_than_naive']:.2f}",
            f"{row['times_the_floor']:.2f}",
            f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
        )
    Console().print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({**machine(), "settings": vars(arguments), "ways": rows}, file, indent=2)


if __name__ == "__main__":
    main()
