"""Serve a repaired model: POST an image and its task, get the class and its score.

    python examples/serve.py FOLDER               # a saved model, or its id on a hub
    curl localhost:8000/predict -H 'Content-Type: application/json' \\
      -d "{\\"task\\": \\"digits\\", \\"image\\": \\"$(base64 -w0 seven.png)\\"}"
    {"task": "digits", "class": "seven", "score": 0.93}

http://localhost:8000 is a page to drop or draw an image on; /health says whether the model is up.
Requests that come together are one forward pass, whatever their tasks. Where the model has a
router, the task may be "auto", and the answer says which one it is. LitServe queues and batches
them (pip install 'fusion-bench-intervmerge[serve]'). The classes are those that the saved model
knows of its tasks; ``--classes`` and ``--clip`` tell others, as for ``intervmerge export``.
"""
# Without `from __future__ import annotations`: LitServe and FastAPI read them as types.

import argparse
import base64
import json
import multiprocessing
import signal
import sys
from pathlib import Path

import litserve
import torch
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from torch import Tensor

from fusion_bench_intervmerge.model.hub import local_folder

MAX_BYTES = 24_000_000
PAGE = Path(__file__).with_suffix(".html")


class Query(BaseModel):
    """The body of a request; the image is a file's bytes in base64."""

    image: str
    task: str


class Refusal(Exception):
    """One line for the client; the others of the batch get their answers."""


class Classifier(litserve.LitAPI):
    """Requests of any tasks -> classes and scores.

    Args:
        model, classes, clip: as the command line has them.
    """

    def __init__(self, model: str, classes: str | None, clip: str | None, **batching):
        super().__init__(**batching)
        self.sources = model, classes, clip

    def setup(self, device):
        # Here and not above: the process that takes the requests needs none of it.
        from fusion_bench_intervmerge.deploy.clip import image_processor
        from fusion_bench_intervmerge.deploy.heads import Heads, known_heads, read_classes
        from fusion_bench_intervmerge.deploy.images import decode_image, pixel_values
        from fusion_bench_intervmerge.model.model import InterventionModel

        self.decode_image, self.pixel_values = decode_image, pixel_values
        name, classes, clip = self.sources
        self.model = InterventionModel.from_pretrained(name).fold().to(device)
        self.processor = image_processor(self.model)
        given = None if classes is None else read_classes(Path(classes))
        heads, self.classes = known_heads(self.model, None, given, clip)
        self.heads = Heads([heads[task] for task in self.model.tasks]).to(device)
        self.names = [*self.model.tasks, *(["auto"] if self.model.router is not None else [])]

    def decode_request(self, request: Query):
        # A refusal is returned: raised, it would be the answer to the whole batch.
        if request.task not in self.names:
            return Refusal(f"task: there is no {request.task!r}, but {', '.join(self.names)}")
        try:
            content = base64.b64decode(request.image, validate=True)
        except ValueError:
            return Refusal("image: not in base64")
        try:
            image = self.decode_image(content)
            return self.pixel_values(self.processor, [image])[0], request.task
        except ValueError as error:
            return Refusal(f"image: {error}")

    def batch(self, inputs):
        return inputs

    @torch.inference_mode()
    def predict(self, batch):
        images = [entry for entry in batch if not isinstance(entry, Refusal)]
        answers = iter(self.classify(*zip(*images, strict=True)) if images else [])
        return [entry if isinstance(entry, Refusal) else next(answers) for entry in batch]

    def classify(self, images, tasks):
        """Images and their tasks, perhaps ``auto`` -> one answer per image, in one forward pass."""
        images, tasks = torch.stack(images).to(self.device), list(tasks)
        routed = [index for index, task in enumerate(tasks) if task == "auto"]
        if routed:
            for index, task in zip(routed, self.model.route(images[routed]), strict=True):
                tasks[index] = task
        answers = [Refusal("image: of no known task")] * len(tasks)
        known = [index for index, task in enumerate(tasks) if task is not None]
        if not known:
            return answers
        named = [tasks[index] for index in known]
        heads = torch.tensor([self.model.tasks.index(task) for task in named])
        logits = self.heads(self.model.encode(images[known], named), heads.to(images.device))
        best = logits.softmax(dim=-1).max(dim=-1)
        for index, task, score, row in zip(known, named, *map(Tensor.tolist, best), strict=True):
            answers[index] = {"task": task, "class": self.classes[task][row], "score": score}
        return answers

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        if isinstance(output, Refusal):
            return JSONResponse({"detail": str(output)}, status_code=422)
        return output


def in_one_line(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong with a request: the field, and why."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
    problem = first["msg"].removeprefix("Value error, ")
    return JSONResponse({"detail": f"{where or 'request'}: {problem}"}, status_code=422)


def make_server(options: argparse.Namespace) -> litserve.LitServer:
    """The service; ``run`` starts it."""
    try:
        folder = local_folder(options.model)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{options.model}: no saved model ({error})")
    if not (options.classes or config["metadata"].get("classes")):
        sys.exit(f"{options.model} does not know its tasks' classes; name them by --classes FILE")
    tasks = config["tasks"]
    shown = [*(["auto"] if config.get("router") else []), *tasks]
    page = PAGE.read_text(encoding="utf-8").replace('["TASKS"]', json.dumps(shown))
    classifier = Classifier(
        str(folder),
        options.classes,
        options.clip,
        max_batch_size=options.batch,
        batch_timeout=options.wait,
    )
    server = litserve.LitServer(
        classifier,
        accelerator=options.accelerator,
        timeout=options.timeout,
        max_payload_size=MAX_BYTES,
        model_metadata={"tasks": tasks},
    )
    server.app.add_exception_handler(RequestValidationError, in_one_line)
    # In front of LitServe's own page.
    server.app.router.routes.insert(0, Route("/", lambda request: HTMLResponse(page)))
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a saved model's folder, or its id on a hub")
    parser.add_argument("--classes", metavar="FILE", help="as for intervmerge export")
    parser.add_argument("--clip", metavar="CLIP", help="as for intervmerge export")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    parser.add_argument("--batch", type=int, default=32, help="images in a pass at most, 2 or more")
    parser.add_argument("--wait", type=float, default=0.005, help="seconds for a batch to fill")
    parser.add_argument("--timeout", type=float, default=30, help="seconds in the queue, then 504")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto")
    options = parser.parse_args()
    if options.batch < 2:
        parser.error("--batch: 2 or more")
    server = make_server(options)
    # LitServe ends its processes after Ctrl-C alone; after `kill` they would go on answering.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        server.run(host=options.host, port=options.port, generate_client_file=False)
    except KeyboardInterrupt:  # before the service was ready
        pass
    finally:
        for child in multiprocessing.active_children():
            child.kill()


def stop(number, frame) -> None:
    """A signal handler; processes that are forked later inherit it."""
    raise KeyboardInterrupt if multiprocessing.parent_process() is None else SystemExit


if __name__ == "__main__":
    main()
