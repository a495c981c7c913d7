"""Trained weights that come with the package, so that a pool's first use takes seconds.

``weights/<pool>/`` holds the tokenizer and ``weights.safetensors``: the pretrained CLIP in half
precision, and so each expert's difference from it. ``shipped.json`` says of which recipe they are,
and what the files' digests must be.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from .material import check, sha256
from .pools import Pool
from .processor import read_tokenizer, write_processor
from .training import save_whole

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "shipped.json"
FILES = ("vocab.json", "merges.txt", "config.json", "weights.safetensors")


def has(pool: Pool) -> bool:
    """Whether the weights of just this recipe and seed are here."""
    manifest = WEIGHTS / pool.name / MANIFEST
    if not manifest.is_file():
        return False
    return json.loads(manifest.read_text(encoding="utf-8"))["recipe"] == pool.digest()


def pack(pool: Pool, folder: Path) -> Path:
    """Makes a pool's folder, trained, what ships; returns where it lies."""
    target = WEIGHTS / pool.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = CLIPModel.from_pretrained(folder / "pretrained")
    before = {name: value.detach() for name, value in model.named_parameters()}
    tensors = {f"pretrained/{name}": value.half() for name, value in before.items()}
    for task in pool.tasks:
        expert = CLIPVisionModel.from_pretrained(folder / "experts" / task)
        for name, value in expert.named_parameters():
            tensors[f"{task}/{name}"] = (value.detach() - before[name]).half()
    (target / "weights.safetensors").write_bytes(save(tensors))
    for name in FILES[:-1]:
        shutil.copy(folder / "pretrained" / name, target / name)
    digests = {name: sha256(target / name) for name in FILES}
    manifest = {"recipe": pool.digest(), "sha256": digests}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return target


def unpack(pool: Pool, folder: Path) -> None:
    """Writes ``pretrained/`` and ``experts/`` as if they had been trained on the spot.

    Raises:
        ConfigError: a file is not what its digest says.
    """
    source = WEIGHTS / pool.name
    for name, digest in json.loads((source / MANIFEST).read_text())["sha256"].items():
        check(source / name, digest)
    model = CLIPModel(CLIPConfig.from_pretrained(source))
    with safe_open(source / "weights.safetensors", "pt") as file:
        names = [name for name, _ in model.named_parameters()]
        before = {name: file.get_tensor(f"pretrained/{name}").float() for name in names}
        model.load_state_dict(before, strict=False)
        expert = CLIPVisionModel(model.config.vision_config)
        for task in pool.tasks:
            for name, value in expert.named_parameters():
                with torch.no_grad():
                    value.copy_(before[name] + file.get_tensor(f"{task}/{name}").float())
            if not (folder / "experts" / task).is_dir():
                save_whole(expert, folder / "experts" / task)
    model.save_pretrained(folder / "pretrained")
    write_processor(read_tokenizer(source, pool.recipe.context), folder / "pretrained")
