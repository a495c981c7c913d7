"""What the published code's habits change, on the two small encoders of the golden numbers.

    python benchmarks/as_published.py

Trains the same edits from the same start with each habit, and prints the loss and how far the
features are from those of our default. benchmarks/README.md quotes the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.distillation.settings import TripleStepAdam
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.encoders.base import VisionTower
from fusion_bench_intervmerge.model.model import InterventionModel

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "reference.safetensors"


def tower(golden: dict[str, Tensor], which: str) -> VisionTower:
    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 4, "heads": 4}
    visual = VisionTransformer(**sizes, mlp_ratio=4, output_dim=24).eval()
    prefix = f"encoder.{which}."
    own = {n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)}
    visual.load_state_dict(own)
    return as_tower(visual)


def faster(model: InterventionModel, ending: str) -> Callable[[Any], torch.optim.Optimizer]:
    """The published optimizer, with twice the rate for some tensors."""
    chosen = [p for n, p in model.edits.named_parameters() if n.endswith(ending)]

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        others = [p for p in parameters if all(p is not c for c in chosen)]
        groups = [{"params": others}, {"params": chosen, "lr": 2e-3}]
        return TripleStepAdam(groups, lr=1e-3)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    golden = load_file(GOLDEN)
    images = golden["encoder.images"].flatten(0, 1)

    def trained(function: str, make: Callable[[InterventionModel], Any]) -> tuple[float, Tensor]:
        sites = {"attention": {"function": function, "rank": 3}}
        model = InterventionModel(tower(golden, "merged"), ["a"], sites)
        done = distill(
            model,
            {"a": lambda: tower(golden, "expert")},
            {"a": images},
            steps=options.steps,
            batch_size=8,
            optimizer=make(model),
        )
        with torch.no_grad():
            return float(done.losses[-6:].mean()), model.encode(images, "a")

    def ours(model: InterventionModel) -> Any:
        return lambda parameters: torch.optim.Adam(parameters, lr=3e-3)

    def published(model: InterventionModel) -> Any:
        return lambda parameters: TripleStepAdam(parameters, lr=1e-3)

    rows = {
        "Adam, 3e-3 (our default)": ("noreft", ours),
        "Adam thrice, 1e-3": ("noreft", published),
        "Adam thrice, 1e-3, b twice as fast": ("noreft", lambda model: faster(model, ".b")),
        "loreft, Adam, 3e-3 (our default)": ("loreft", ours),
        "loreft, Adam thrice, 1e-3": ("loreft", published),
        "loreft, Adam thrice, 1e-3, R twice as fast": (
            "loreft",
            lambda model: faster(model, ".R.original"),
        ),
    }
    print(f"{'training':44} {'mean L1':>8} {'features off':>13}")
    default: dict[str, Tensor] = {}
    for name, (function, make) in rows.items():
        loss, features = trained(function, make)
        reference = default.setdefault(function, features)
        off = float((features - reference).abs().mean())
        print(f"{name:44} {loss:8.4f} {off:13.4f}")


if __name__ == "__main__":
    main()
