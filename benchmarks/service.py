"""What the service of examples/serve.py takes on one machine, and whether each answer is right.

    python benchmarks/service.py --json service.json           # 10,000 requests of 8 clients
    python benchmarks/service.py --size b32 --requests 400

Clients and server share the machine, over 127.0.0.1. Each client sends one image after the other,
each of a task drawn at random; classes and scores are compared with ``encode`` and the zero-shot
heads in this process. Beside it the bare encoder's throughput, in batches of the service's size.
The edits are random: neither speed nor rightness depends on what they learnt.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from fusion_bench_intervmerge.deploy.clip import image_processor
from fusion_bench_intervmerge.deploy.heads import known_heads
from fusion_bench_intervmerge.deploy.images import decode_image, pixel_values
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.fusion.embedded.pool import load_processor
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.tinyclip import ensure_pool
from fusion_bench_intervmerge.tinyclip.tasks import TASKS

SERVE = Path(__file__).parents[1] / "examples" / "serve.py"
# OpenAI's ViT-B/32; its text tower is as small as the embedded one's tokenizer allows.
B32 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
SCORE_TOLERANCE = 1e-4


def make_model(size: str, tasks: Sequence[str], folder: Path, rank: int = 1) -> InterventionModel:
    """A model with random edits on the embedded CLIP, or on a random one of B/32's size."""
    base = str(ensure_pool() / "pretrained")
    processor: Any = load_processor()
    preprocessor = json.loads(processor.image_processor.to_json_string())
    if size == "b32":
        torch.manual_seed(0)
        text = CLIPModel.from_pretrained(base).config.text_config.to_dict()
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=B32, projection_dim=512))
        base = str(folder / "clip")
        clip.save_pretrained(base)
        processor.tokenizer.save_pretrained(base)
        preprocessor |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    model = InterventionModel(
        as_tower(CLIPModel.from_pretrained(base)), tasks, {"attention": {"rank": rank}}
    )
    classes = {
        task: {"names": list(TASKS[task].classnames), "templates": list(TASKS[task].prompts)}
        for task in tasks
    }
    model.metadata = {"base_model": base, "preprocessor": preprocessor, "classes": classes}
    model.save_pretrained(folder / "model")
    return model


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[int]:
    """The service of a saved model while the block runs; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVE), str(folder), f"--port={port}", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 240
            while not is_ready(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-3000:])
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            until = time.monotonic() + 30
            while process.poll() is None or is_running(process.pid):
                if time.monotonic() > until:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise RuntimeError("the service did not stop with all its processes")
                time.sleep(0.1)


def is_running(group: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(
    connection: HTTPConnection, task: Any = None, image: Any = None
) -> tuple[int, dict[str, Any]]:
    """One request: status, answer."""
    given = {"task": task, "image": image}
    body = json.dumps({key: value for key, value in given.items() if value is not None})
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def pictures(tasks: Sequence[str], count: int) -> dict[str, list[str]]:
    """Some images of each task as PNG in base64."""
    return {task: [as_png(image) for image in TASKS[task].images(1, "test", count)[0]]
            for task in tasks}  # fmt: skip


def as_png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


@torch.no_grad()
def right_answers(
    model: InterventionModel, images: dict[str, list[str]]
) -> dict[tuple[str, int], tuple[str, float]]:
    """(task, index of the image) -> class and score, by ``encode``, a task at a time."""
    heads, names = known_heads(model)
    processor = image_processor(model)
    found = {}
    for task, encoded in images.items():
        opened = [decode_image(base64.b64decode(x)) for x in encoded]
        features = F.normalize(model.encode(pixel_values(processor, opened), task), dim=-1)
        shares = (features @ heads[task].T).softmax(dim=-1)
        for index, share in enumerate(shares):
            found[task, index] = names[task][int(share.argmax())], float(share.max())
    return found


def load(
    port: int, model: InterventionModel, requests: int, clients: int, images_a_task: int = 32
) -> dict[str, Any]:
    """Send requests from several clients at once, and check every answer."""
    images = pictures(model.tasks, images_a_task)
    right = right_answers(model, images)
    seconds: list[float] = []
    wrong: list[Any] = []
    deviations: list[float] = []

    def client(number: int) -> None:
        draw = random.Random(number)
        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        for _ in range(number, requests, clients):
            task, index = draw.choice(model.tasks), draw.randrange(images_a_task)
            started = time.perf_counter()
            status, said = ask(connection, task, images[task][index])
            seconds.append(time.perf_counter() - started)
            name, score = right[task, index]
            deviations.append(abs(said.get("score", 9.0) - score))
            if status != 200 or said["task"] != task or said["class"] != name:
                wrong.append((status, said, name, score))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - started
    return {
        "requests": len(seconds),
        "wrong": len(wrong),
        "largest deviation of a score": max(deviations),
        "requests a second": len(seconds) / taken,
        "p50, ms": 1000 * float(np.percentile(seconds, 50)),
        "p99, ms": 1000 * float(np.percentile(seconds, 99)),
    }


@torch.inference_mode()
def bare(model: InterventionModel, batch: int, turns: int = 5) -> float:
    """Images a second through the merged encoder alone, the best of some turns."""
    size = model.tower.spec()["vision_config"].get("image_size", 224)
    images = torch.randn(batch, 3, size, size)
    best = float("inf")
    for turn in range(turns + 1):
        started = time.perf_counter()
        model.tower.features(images)
        if turn:  # the first warms up
            best = min(best, time.perf_counter() - started)
    return batch / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "b32"), default="tiny")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="images in a pass at most")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(arguments.size, list(TASKS), folder)
        found: dict[str, Any] = {
            "bare encoder, images a second, batches of the clients": bare(model, arguments.clients),
            "bare encoder, images a second, full batches": bare(model, arguments.batch),
        }
        with serving(folder / "model", f"--batch={arguments.batch}", "--accelerator=cpu") as port:
            load(port, model, 200, arguments.clients)  # warms up
            found |= load(port, model, arguments.requests, arguments.clients)
    console = Console()
    for name, value in found.items():
        console.print(f"{name}: {value:,.6g}", highlight=False)
    if arguments.json:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        facts |= {"machine": platform.machine(), "settings": vars(arguments)}
        Path(arguments.json).write_text(json.dumps({**facts, **found}, indent=2) + "\n")
    if found["wrong"] or found["largest deviation of a score"] > SCORE_TOLERANCE:
        sys.exit("answers are wrong")


if __name__ == "__main__":
    main()
