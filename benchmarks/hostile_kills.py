"""A small training that is killed again and again, also between its end and its save.

    python benchmarks/hostile_kills.py --kills 15

The run trains edits and coefficients, saves the model and clears its states. It is killed (SIGKILL)
at random moments, half of them after the last step, and started again until it gets through; then
its losses and every file of the model are compared with those of a run that was left alone. Rounds
of that follow one another until there were enough kills.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.distillation.states import StateFolder
from fusion_bench_intervmerge.encoders.openclip import MEAN, STD, OpenCLIPTower
from fusion_bench_intervmerge.merging import mix
from fusion_bench_intervmerge.model.model import InterventionModel

TASKS = ["ants", "bees", "cats"]
STEPS = 20
SPEC = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "layers": 3,
    "heads": 4,
    "mlp_ratio": 2.0,
    "output_dim": 16,
    "quick_gelu": True,
    "mean": MEAN,
    "std": STD,
}


def tower(seed: int = 0) -> OpenCLIPTower:
    torch.manual_seed(0)
    made = OpenCLIPTower.from_spec(SPEC)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += bool(seed) * 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def run(folder: Path, pause: float = 0.0) -> None:
    """The training, the save, and only then the end of its states."""
    experts = {task: lambda seed=seed: tower(seed) for seed, task in enumerate(TASKS, start=1)}
    images = {
        task: torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for seed, task in enumerate(TASKS)
    }
    merged = tower()
    start = torch.full((3, len(merged.mergeable())), 0.3)
    mixture = mix(merged, (experts[task]() for task in TASKS), start)
    model = InterventionModel(merged, TASKS, {"attention": {"function": "loreft", "rank": 2}})

    def optimizer(parameters):
        adam = torch.optim.Adam(parameters, lr=3e-3)
        adam.register_step_post_hook(lambda *_: time.sleep(pause))
        return adam

    done = distill(
        model,
        experts,
        images,
        steps=STEPS,
        batch_size=4,
        mixture=mixture,
        **({"optimizer": optimizer} if pause else {}),
        states=StateFolder(folder / "states", "the same run"),
        save_every=1,
    )
    time.sleep(pause)
    model.save_pretrained(folder / "model")
    save_file({"losses": done.losses}, folder / "losses.safetensors")
    time.sleep(pause)
    done.clear()


def newest(folder: Path) -> int:
    steps = [int(p.stem[5:]) for p in (folder / "states").glob("step-*.safetensors")]
    return max(steps, default=0)


def result(folder: Path) -> dict[str, bytes]:
    files = [*(folder / "model").rglob("*"), folder / "losses.safetensors"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


def start(folder: Path, pause: float) -> int:
    child = os.fork()
    if child == 0:
        run(folder, pause)
        os._exit(0)
    return child


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def killed(child: int, folder: Path, chosen: random.Random, duration: float) -> str | None:
    """Kill at a random moment; in words where the run then stood, None where it had ended."""
    at_the_end = chosen.random() < 0.5
    deadline = time.monotonic() + (60.0 if at_the_end else chosen.random() * duration)
    while time.monotonic() < deadline and not (at_the_end and newest(folder) == STEPS):
        if ended(child):
            return None
        time.sleep(0.001)
    if at_the_end:
        time.sleep(chosen.random() * 0.1)
    if ended(child):
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if (folder / "losses.safetensors").is_file():
        return "after the save"
    step = newest(folder)
    if step == STEPS:
        return "between the training's end and the save's"
    return "while it trained" if step else "before the first state"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = random.Random(options.seed)
    where: Counter[str] = Counter()
    rounds = differ = left = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        started = time.monotonic()
        os.waitpid(start(root / "undisturbed", 0.05), 0)
        duration = time.monotonic() - started
        expected = result(root / "undisturbed")
        while sum(where.values()) < options.kills:
            folder = root / f"round-{rounds}"
            rounds += 1
            while sum(where.values()) < options.kills:
                moment = killed(start(folder, 0.05), folder, chosen, duration)
                if moment is None:
                    break
                where[moment] += 1
            os.waitpid(start(folder, 0.0), 0)
            differ += result(folder) != expected
            left += (folder / "states").exists()
    for moment, count in where.items():
        print(f"killed {moment}: {count}")
    print(f"runs: {rounds}; with other bits: {differ}; with states left behind: {left}")
    sys.exit(bool(differ or left))


if __name__ == "__main__":
    main()
