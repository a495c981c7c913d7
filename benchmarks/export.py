"""What exported files give: deviation from the model, predictions, accuracy, size, speed.

    python benchmarks/export.py FOLDER --json export.json   # saved by a run on the embedded pool
    python benchmarks/export.py --size b32                  # random weights of ViT-B/32's size

Each format runs on the same images of all tasks, mixed, in batches of ``--batch``. Accuracies are
of the embedded pool's test images, and only with FOLDER.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from service import make_model
from torch import Tensor

from fusion_bench_intervmerge.deploy.clip import image_processor
from fusion_bench_intervmerge.deploy.export import SUFFIXES, export
from fusion_bench_intervmerge.deploy.heads import Heads, known_heads
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.tinyclip.tasks import TASKS

FORMATS = [("onnx", "fp32"), ("torch", "fp32"), ("onnx", "fp16"), ("onnx", "int8")]
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def draw(model: InterventionModel, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Test images of every task, in a mixed order: pixel values, task indices, labels."""
    processor = image_processor(model)
    pixels, indices, labels = [], [], []
    for index, task in enumerate(model.tasks):
        drawn, truth = TASKS[task].images(0, "test", count)
        pictures = [Image.fromarray(image) for image in drawn]
        pixels.append(processor(pictures, return_tensors="pt")["pixel_values"])
        indices.append(torch.full((count,), index))
        labels.append(torch.as_tensor(truth))
    order = torch.randperm(count * len(pixels), generator=torch.Generator().manual_seed(0))
    return torch.cat(pixels)[order], torch.cat(indices)[order], torch.cat(labels)[order]


def in_batches(run: Run, pixels: Tensor, indices: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        given = zip(pixels.split(batch), indices.split(batch), strict=True)
        features, logits = zip(*(run(*images) for images in given), strict=True)
    return torch.cat(features), torch.cat(logits)


def load(file: Path, to: str) -> Run:
    if to == "torch":
        return torch.export.load(file).module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options)

    def run(pixels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        given = {"pixel_values": pixels.numpy(), "task": indices.numpy()}
        features, logits = session.run(["image_features", "logits"], given)
        return torch.from_numpy(features), torch.from_numpy(logits)

    return run


def measure(model: InterventionModel, count: int, batch: int, turns: int) -> list[dict[str, Any]]:
    """A row a format, the model itself first."""
    pixels, indices, labels = draw(model, count)
    heads, names = known_heads(model)
    last = Heads([heads[task] for task in model.tasks])

    def original(pixels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        features = model.encode(pixels, [model.tasks[index] for index in indices])
        return features, last(features, indices)

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        runs: dict[str, tuple[Run, int | None]] = {"encode": (original, None)}
        for to, dtype in FORMATS:
            file = Path(temporary) / f"{dtype}{SUFFIXES[to]}"
            export(model, file, to, fold=True, dtype=dtype, heads=heads, classes=names)
            runs[f"{to}, {dtype}"] = (load(file, to), file.stat().st_size)
        wanted, wanted_logits = in_batches(original, pixels, indices, batch)
        for name, (run, size) in runs.items():
            best = float("inf")
            for _ in range(turns):
                started = time.perf_counter()
                features, logits = in_batches(run, pixels, indices, batch)
                best = min(best, time.perf_counter() - started)
            same = (logits.argmax(dim=1) == wanted_logits.argmax(dim=1)).sum()
            right = logits.argmax(dim=1) == labels
            by_task = [right[indices == index].float().mean() for index in range(len(model.tasks))]
            rows.append(
                {
                    "format": name,
                    "MB": None if size is None else size / 1e6,
                    "deviation": float((features - wanted).abs().max() / wanted.abs().max()),
                    "predictions that differ": len(labels) - int(same),
                    "images": len(labels),
                    "accuracy": 100 * float(np.mean(by_task)),
                    "images a second": len(labels) / best,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="a model saved by a run on the embedded pool")
    parser.add_argument("--size", choices=("tiny", "b32"), default="tiny", help="without FOLDER")
    parser.add_argument("--images", type=int, default=480, help="a task")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    if arguments.folder:
        model = InterventionModel.from_pretrained(arguments.folder)
        rows = measure(model, arguments.images, arguments.batch, arguments.turns)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            model = make_model(arguments.size, list(TASKS), Path(temporary))
            rows = measure(model, arguments.images, arguments.batch, arguments.turns)
    table = Table(title="exported files against the model")
    shown = [key for key in rows[0] if key != "accuracy" or arguments.folder]
    for key in shown:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(
            *("" if row[k] is None else f"{row[k]:.4g}" if k != "format" else row[k] for k in shown)
        )
    Console(width=120).print(table)
    if arguments.json:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        facts |= {"onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
        facts["settings"] = vars(arguments)
        Path(arguments.json).write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
