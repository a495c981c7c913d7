"""Classify images with a repaired model from a hub: transformers, onnxruntime and pillow will do.

    python examples/classify.py OWNER/MODEL TASK IMAGE...

The model was put there by ``intervmerge push``. ``HF_ENDPOINT`` names another hub than
huggingface.co. A folder in place of OWNER/MODEL is read as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoImageProcessor


def main(repo: str, task: str, *files: str) -> None:
    name = "onnx/model.onnx"
    graph = Path(repo) / name if Path(repo).is_dir() else hf_hub_download(repo, name)
    session = onnxruntime.InferenceSession(str(graph))
    about = session.get_modelmeta().custom_metadata_map
    tasks, classes = json.loads(about["tasks"]), json.loads(about["classes"])
    if task not in tasks:
        sys.exit(f"{repo} has no task {task!r}; it has: {', '.join(tasks)}")
    if task not in classes:
        sys.exit(f"{repo} does not say which classes {task!r} has")

    images = [Image.open(file).convert("RGB") for file in files]
    processor = AutoImageProcessor.from_pretrained(repo)
    pixels = processor(images, return_tensors="np")["pixel_values"].astype(np.float32)
    # A batch may be of many tasks; here all images are of one.
    indices = np.full(len(files), tasks.index(task))
    (logits,) = session.run(["logits"], {"pixel_values": pixels, "task": indices})
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    for file, share in zip(files, shares, strict=True):
        print(f"{file}: {classes[task][share.argmax()]} {share.max():.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python classify.py OWNER/MODEL TASK IMAGE...")
    main(*sys.argv[1:])
