"""The checkpoints and data sets of ``+experiment=published`` on a hub of our own, made at random.

    python tests/published_hub.py FOLDER      # ViT-B/32 and eight experts, 3.4 GB

then ``python tests/loopback_hub.py 8123 FOLDER`` and ``HF_ENDPOINT=http://127.0.0.1:8123``. Nothing
that is measured there means anything, but that everything runs.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from fusion_bench.tasks.clip_classification import get_classnames
from loopback_hub import Hub
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModel

from fusion_bench_intervmerge.tinyclip import ensure_pool

CLIP = "openai/clip-vit-base-patch32"
DATA = {
    "mnist": "ylecun/mnist",
    "svhn": "ufldl-stanford/svhn",
    "stanford-cars": "tanganke/stanford_cars",
}
TASKS = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]


def fill(hub: Hub, config: CLIPConfig, images: int, tasks: Sequence[str] = TASKS) -> None:
    """Put a CLIP, experts near it, and images of each task on a hub.

    Args:
        config: the CLIP's; its tokenizer is the embedded pool's.
        images: in each split of each task.
    """
    torch.manual_seed(0)
    tokenizer = ensure_pool() / "pretrained"
    config.text_config.eos_token_id = CLIPTokenizer.from_pretrained(tokenizer).eos_token_id
    clip = CLIPModel(config)
    names = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
    own = {name: (tokenizer / name).read_bytes() for name in (*names, "vocab.json")}
    pixels = config.vision_config.image_size
    hub.commit(
        CLIP,
        own
        | saved(clip)
        | saved(CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size=pixels)),
    )
    expert = CLIPVisionModel(config.vision_config)
    for task in tasks:
        expert.load_state_dict(clip.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        hub.commit(f"tanganke/{CLIP.partition('/')[2]}_{task}", saved(expert))
        hub.commit(DATA.get(task, f"tanganke/{task}"), dataset(task, images))


def saved(part: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def dataset(task: str, images: int) -> dict[str, bytes]:
    """Noise with labels, as Parquet files."""
    random, classes = np.random.default_rng(0), get_classnames(task)
    content = {}
    for split in ("train", "test"):
        columns = {
            "image": [random.integers(0, 256, (40, 40, 3), "uint8") for _ in range(images)],
            "label": random.integers(0, len(classes), images).tolist(),
        }
        features = Features({"image": Image(), "label": ClassLabel(num_classes=len(classes))})
        file = io.BytesIO()
        Dataset.from_dict(columns, features=features).to_parquet(file)
        content[f"{split}.parquet"] = file.getvalue()
    config = "cropped_digits" if task == "svhn" else "default"
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
    for split in ("train", "test"):
        card += f"  - split: {split}\n    path: {split}.parquet\n"
    return {**content, "README.md": f"{card}---\n".encode()}


if __name__ == "__main__":
    fill(Hub(Path(sys.argv[1])), CLIPConfig(), 24)
