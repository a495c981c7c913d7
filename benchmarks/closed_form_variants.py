"""What was tried in the closed form, and what each costs or gains, on the embedded pool.

    python benchmarks/closed_form_variants.py places      # one budget, spent in other ways
    python benchmarks/closed_form_variants.py ridge       # fixed ridges against cross-validation
    python benchmarks/closed_form_variants.py class_weight
    python benchmarks/closed_form_variants.py output      # residuals as the output feels them
    python benchmarks/closed_form_variants.py soft_labels # refined by labels too
    python benchmarks/closed_form_variants.py attention   # patches weighed by attention

Average accuracy over tasks on the test split, edits on every block's output, all tokens, solved on
480 images of the test split (transductive) or on some of the training split (held-out, three seeds
of images), for two merges.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import lightning as L
import torch
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from torch.utils.data import DataLoader, TensorDataset

from fusion_bench_intervmerge.data import DataSettings, choose_images
from fusion_bench_intervmerge.fusion.embedded.pool import EmbeddedCLIPVisionModelPool
from fusion_bench_intervmerge.fusion.merge import run_base
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving import solve as solver
from fusion_bench_intervmerge.solving import sweep
from fusion_bench_intervmerge.solving.regression import Regression
from fusion_bench_intervmerge.solving.solve import solve

BUDGET, COST = 24768, 2 * 64 + 1
SEEDS = (0, 1, 2)
HELD_OUT = (8, 32, 128, 480)


class Bench:
    """The pool's merges, images in memory, and accuracies."""

    def __init__(self) -> None:
        host = EmbeddedCLIPVisionModelPool()
        self.pool = ExpertPool(host)
        fabric = L.Fabric(devices=1, accelerator="cpu")
        methods = {
            "Task Arithmetic": TaskArithmeticAlgorithm(scaling_factor=0.3),
            "Weight Averaging": SimpleAverageAlgorithm(),
        }
        self.merges = {
            name: self.pool.wrap(run_base(method, host, fabric, None))
            for name, method in methods.items()
        }
        self.tasks = self.pool.tasks
        self.experts = {task: partial(self.pool.tower, task) for task in self.tasks}
        self.heads = {task: self.pool.head(task) for task in self.tasks}
        self.data = {
            split: {task: self._whole(task, split) for task in self.tasks}
            for split in ("test", "train")
        }

    def _whole(self, task: str, split: str) -> TensorDataset:
        dataset = self.pool.images(task, split)
        return TensorDataset(*next(iter(DataLoader(dataset, batch_size=len(dataset)))))

    @torch.no_grad()
    def accuracy(self, model: InterventionModel) -> float:
        found = []
        for task in self.tasks:
            images, labels = self.data["test"][task].tensors
            right = self.heads[task](model.encode(images, task)).argmax(dim=1) == labels
            found.append(100 * right.float().mean().item())
        return statistics.mean(found)

    def model(self, merge: str, rank: int = 4, blocks: object = "all") -> InterventionModel:
        site = {"function": "nodireft", "tokens": "all", "init": "regression"}
        site |= {"rank": rank, "blocks": blocks}
        return InterventionModel(copy.deepcopy(self.merges[merge]), self.tasks, {"block": site})

    def solved(self, merge: str, split: str, images: int, seed: int, **options: object) -> float:
        own = {key: options.pop(key) for key in ("rank", "blocks") if key in options}
        model = self.model(merge, **own)
        solve(model, self.experts, self.data[split], data={"images": images}, seed=seed, **options)
        return self.accuracy(model)

    def lines(self, name: str, held_out: tuple[int, ...] = HELD_OUT, **options: object) -> None:
        """Print a setting's accuracies, transductive first."""
        for merge in self.merges:
            line = {"setting": name, "merge": merge}
            line["480 test"] = round(self.solved(merge, "test", 480, 0, **options), 1)
            for images in held_out:
                found = [self.solved(merge, "train", images, s, **options) for s in SEEDS]
                spread = statistics.stdev(found)
                line[f"{images} train"] = f"{statistics.mean(found):.1f} ± {spread:.1f}"
            print(json.dumps(line, ensure_ascii=False), flush=True)


def places(bench: Bench) -> None:
    """The same 24,768 numbers elsewhere."""
    for name, options in {
        "given out by gain": {"budget": BUDGET},
        "the same rank in every block": {"rank": 4},
        "every second block": {"rank": 8, "blocks": "every_2"},
        "all in the first block": {"rank": 24, "blocks": "first_1"},
        "all in the last block": {"rank": 24, "blocks": "last_1"},
    }.items():
        bench.lines(name, (128,), **options)
    original = solver.share_out
    for seed in SEEDS:
        solver.share_out = partial(_at_random, random.Random(seed))
        bench.lines(f"random ranks, draw {seed}", (128,), budget=BUDGET)
    solver.share_out = original


def _at_random(draw: random.Random, model: object, gains: dict, budget: int) -> dict:
    ranks = {task: dict.fromkeys(of, 0) for task, of in gains.items()}
    every = [(task, place) for task, of in gains.items() for place in of]
    for _ in range(budget // COST):
        task, place = draw.choice([e for e in every if ranks[e[0]][e[1]] < 64])
        ranks[task][place] += 1
    return ranks


def ridge(bench: Bench) -> None:
    for value in (None, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        bench.lines(f"ridge {value or 'cross-validated'}", ridge=value)


def class_weight(bench: Bench) -> None:
    for value in (1 / 16, 1 / 4, 1 / 2, 1, 2):
        bench.lines(f"class token counts {value:g} of all patches", (128,), class_weight=value)


def output(bench: Bench) -> None:
    """Residuals in the metric of the output: the second moment of its gradient at each block."""
    for fit, share, last in (
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (True, True, False),
        (True, False, True),
    ):
        where = ["directions"] * fit + ["budget"] * share
        name = " and ".join(where) or "unweighted"
        name += " of the last block alone" if last else ""
        with weighed(bench, fit, share, last):
            for budget in (None, 6192, BUDGET):
                bench.lines(f"{name}, budget {budget or 'none, rank 4'}", (128,), budget=budget)


@contextmanager
def weighed(bench: Bench, fit: bool, share: bool, last: bool) -> Iterator[None]:
    """Solving with residuals measured in the output's metric M: |y|^2 becomes y'My."""
    metrics: dict[tuple[str, int], list[torch.Tensor]] = {}
    at: dict[str, object] = {}

    def metric() -> tuple[torch.Tensor, torch.Tensor]:
        key = (at["task"], at["images"])
        if key not in metrics:
            images = bench.data["train"][at["task"]].tensors[0]
            chosen = choose_images(at["task"], len(images), DataSettings(images=at["images"]))
            metrics[key] = _metrics(bench.pool.tower(at["task"]), images[chosen])
        matrix = metrics[key][at["block"]]
        matrix = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    class Weighed(Regression):
        def affine_gains(self) -> torch.Tensor:
            return self._weighed()[0].clamp_min(1e-30)[None] if share else super().affine_gains()

        def affine(self, rank: int) -> tuple[torch.Tensor, ...]:
            if not fit or (last and at["block"] < 5):
                return super().affine(rank)
            directions = self._weighed()[1][:, :rank]
            root, inverse = metric()
            W1 = self.slope_along((root @ directions)[None])[0].T[None]
            b = (directions.T @ root @ self.mean_y[0])[None] - (W1 @ self.mean_x[0])
            return W1, (inverse @ directions).T[None].contiguous(), b

        def _weighed(self) -> tuple[torch.Tensor, torch.Tensor]:
            root, _ = metric()
            slope = self.slope_along(torch.eye(64)[None].double())[0]
            fitted = slope.T @ self._xx[0] @ slope
            fitted = fitted + torch.outer(self.mean_y[0], self.mean_y[0])
            values, vectors = torch.linalg.eigh(root @ fitted @ root)
            return values.flip(0), vectors.flip(1)

    placed = sweep.Sweep._place

    def place(self, site, block, moments):
        images = int(moments.count[0]) // (1 if block == 5 else self.tower.num_tokens)
        at.update(task=self.task, block=block, images=images)
        return placed(self, site, block, moments)

    sweep.Sweep._place, sweep.Regression = place, Weighed
    try:
        yield
    finally:
        sweep.Sweep._place, sweep.Regression = placed, Regression


def attention(bench: Bench) -> None:
    """Patches weighed by the attention of the expert's class token in the next block."""
    original = sweep.Sweep._weights
    found: dict[str, torch.Tensor] = {}

    def weights(self: sweep.Sweep, block: int) -> torch.Tensor:
        plain = original(self, block)
        if block == self.tower.num_blocks - 1:
            return plain
        if self.task not in found:
            found[self.task] = _attention(self.expert, bench.data["train"][self.task].tensors[0])
        paid = found[self.task][block + 1, 1:]
        return torch.cat([plain[:1], len(paid) * paid / paid.sum()])

    sweep.Sweep._weights = weights
    bench.lines("weighed by attention, rank 4", (128,), rank=4)
    bench.lines("weighed by attention, budget 24768", (128,), budget=BUDGET)
    sweep.Sweep._weights = original


@torch.no_grad()
def _attention(expert: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(blocks, tokens), the class token's attention, mean over heads and images."""
    model = copy.deepcopy(expert.model)
    model.set_attn_implementation("eager")
    paid = model(images[:480], output_attentions=True).attentions
    return torch.stack([block[:, :, 0].mean(dim=(0, 1)) for block in paid])


def soft_labels(bench: Bench) -> None:
    """A budget of 24,768, refined by 200 steps: L1 alone, and with cross-entropy to the expert."""
    for merge in bench.merges:
        for share in (0.0, 0.1, 1.0):
            found = [_refined(bench, merge, share, seed) for seed in SEEDS]
            mean, spread = statistics.mean(found), statistics.stdev(found)
            line = {
                "cross-entropy": share,
                "merge": merge,
                "128 train": f"{mean:.1f} ± {spread:.1f}",
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)


def _refined(bench: Bench, merge: str, share: float, seed: int) -> float:
    model = bench.model(merge)
    data = bench.data["train"]
    solution = solve(model, bench.experts, data, budget=BUDGET, data={"images": 128}, seed=seed)
    optimizer = torch.optim.Adam(model.edits.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(200):
        for task in bench.tasks:
            rows = torch.randperm(128, generator=draw)[:16].tolist()
            images = data[task].tensors[0][[solution.images[task][row] for row in rows]]
            wanted = solution.expert_features[task][rows]
            got = model.encode(images, task)
            loss = (got - wanted).abs().mean()
            if share:
                labels = bench.heads[task](wanted).mul(100).softmax(dim=1)
                logits = bench.heads[task](got).mul(100)
                loss = loss + share * torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return bench.accuracy(model)


@torch.enable_grad()
def _metrics(expert: torch.nn.Module, images: torch.Tensor, draws: int = 4) -> list[torch.Tensor]:
    expert.eval().requires_grad_(False)
    found = [torch.zeros(64, 64).double() for _ in range(6)]
    for draw in range(draws):
        states = expert.embed(images).requires_grad_()
        leaving = []
        for block in range(6):
            states = expert.run_block(block, states)
            states.retain_grad()
            leaving.append(states)
        features = expert.readout(states)
        direction = torch.randn(64, generator=torch.Generator().manual_seed(draw))
        (features @ direction).sum().backward()
        for block, state in enumerate(leaving):
            gradient = state.grad.double().flatten(0, 1)
            found[block] += gradient.T @ gradient / len(images) / draws
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = {f.__name__: f for f in (places, ridge, class_weight, output, attention, soft_labels)}
    parser.add_argument("what", choices=what, nargs="+")
    options = parser.parse_args()
    bench = Bench()
    for name in options.what:
        what[name](bench)


if __name__ == "__main__":
    main()
