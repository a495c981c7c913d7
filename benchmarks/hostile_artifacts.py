"""Saved models under attack: flipped bits, odd names, threads, savers, kills, malformed configs.

    python benchmarks/hostile_artifacts.py [bits names threads savers kills configs] [--seconds 60]

Each part prints one line of counts. Small random encoders; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_intervmerge.config import ArtifactError, ConfigError
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.encoders.base import VisionTower
from fusion_bench_intervmerge.encoders.convert import to_openclip
from fusion_bench_intervmerge.model import artifact
from fusion_bench_intervmerge.model.model import InterventionModel

TASKS = ["mnist", "svhn", "stanford-cars"]
SITES = {
    "attention": {"function": "loreft", "rank": 2},
    "mlp": {"tokens": "patch", "part": {"size": 8, "shift": True}},
    "output": {"function": "surgery", "rank": 3},
}


def small_tower(seed: int = 0, openclip: bool = False) -> VisionTower:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    tower = as_tower(CLIPVisionModel(config).eval(), torch.nn.Linear(32, 16, bias=False))
    return to_openclip(tower, (0.5,) * 3, (0.5,) * 3) if openclip else tower


def small_model(
    seed: int = 0, tasks: list[str] | None = None, openclip: bool = False
) -> InterventionModel:
    model = InterventionModel(small_tower(seed, openclip), tasks or TASKS, SITES, seed)
    with torch.no_grad():
        for parameter in model.edits.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.metadata = {"images": "none", "coefficients": {"coefficients": torch.rand(3)}}
    return model


def some_images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


# -- flipped bits ----------------------------------------------------------------------------------


def flipped_bits(folder: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Flip one bit of a saved model at a time, in every kind of file; the file is mended after."""
    draw = random.Random(seed)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    for number in range(count):
        file = files[number % len(files)]
        content = file.read_bytes()
        flipped = bytearray(content)
        position = draw.randrange(8 * len(content))
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        yield f"bit {position} of {file.relative_to(folder)}"
        file.write_bytes(content)


def bits(arguments: argparse.Namespace, sandbox: Path) -> Counter:
    small_model().save_pretrained(sandbox / "m")
    found: Counter = Counter(loaded=0, refused=0, tracebacks=0)
    for what in flipped_bits(sandbox / "m", arguments.bits, arguments.seed):
        found[outcome(sandbox / "m", what)] += 1
    return found


def outcome(folder: Path, what: str = "") -> str:
    """What loading comes to: ``loaded``, ``refused`` in one line, or ``tracebacks``."""
    try:
        InterventionModel.from_pretrained(folder)
    except ArtifactError as error:
        if "\n" not in str(error):
            return "refused"
        print(f"{what}: many lines: {error}", file=sys.stderr)
        return "tracebacks"
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)
        return "tracebacks"
    print(f"{what}: loaded", file=sys.stderr)
    return "loaded"


# -- task names ------------------------------------------------------------------------------------

GOOD_NAMES: list[Any] = [
    "cifar100",
    "emnist_letters",
    "resisc45",
    "rendered-sst2",
    "oxford-iiit-pet",
    "class",
    "None",
    "task 1",
    "Straße",
    "日本語",
    "हिन्दी",
    "e\u0301tage",
    "\uff11\uff12",
    "é" * 64,
    "x" * 128,
]
BAD_NAMES: list[Any] = [
    "",
    " ",
    "x ",
    " x",
    ".",
    "..",
    ".hidden",
    "a.b",
    "a/b",
    "a\\b",
    "../up",
    "/tmp/x",
    "~",
    "~root",
    "$HOME",
    "-rf",
    "a:b",
    "a*b",
    "a?b",
    "a|b",
    "<a>",
    "a'b",
    'a"b',
    "%2e%2e",
    "a\nb",
    "a\0b",
    "a\tb",
    "\x1b[31m",
    "\u202egnp",
    "\u200b",
    "\ud800",
    "😀",
    "CON",
    "nul",
    "com1",
    "average",
    "model_info",
    "auto",
    "training",
    "items",
    "_merged_",
    "MNIST",
    "x" * 129,
    "é" * 65,
    3,
    None,
    True,
]


def names(arguments: argparse.Namespace, sandbox: Path) -> Counter:
    found: Counter = Counter(refused=0, round_trips=0, wrong=0, outside=0, tracebacks=0)
    for number, name in enumerate(GOOD_NAMES + BAD_NAMES):
        place = sandbox / f"{number}"
        place.mkdir()
        found[round_trip(name, place / "inside" / "m")] += 1
        found["outside"] += sum(file.name != "inside" for file in place.iterdir())
    found["outside"] += sum(not file.name.isdigit() for file in sandbox.iterdir())
    return found


def round_trip(name: Any, folder: Path) -> str:
    """Save and load a model with a task of that name beside mnist."""
    try:
        model = small_model(tasks=["mnist", name])
        model.save_pretrained(folder)
        loaded = InterventionModel.from_pretrained(folder)
        with torch.no_grad():
            same = torch.equal(
                loaded.encode(some_images(), name), model.encode(some_images(), name)
            )
        return "round_trips" if same and loaded.tasks == model.tasks else "wrong"
    except ConfigError as error:
        return "refused" if "\n" not in str(error) else "tracebacks"
    except Exception as error:
        print(f"{name!r}: {type(error).__name__}: {error}", file=sys.stderr)
        return "tracebacks"


# -- threads ---------------------------------------------------------------------------------------


def threads(arguments: argparse.Namespace, sandbox: Path) -> Counter:
    model, images = small_model(), some_images()
    routes: list[Any] = [None, *TASKS, TASKS * 2, TASKS[::-1] * 2, [TASKS[0]] * 6, TASKS[1]]

    def encode(route: Any) -> Tensor:
        with torch.no_grad():
            return model.encode(images, route)

    expected = [encode(route) for route in routes]
    rounds = arguments.encodes // len(routes)
    sys.setswitchinterval(1e-5)  # threads take turns within a forward pass
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encode, routes * rounds))
    right = [torch.equal(f, e) for f, e in zip(found, expected * rounds, strict=True)]
    return Counter(encodes=len(right), wrong=right.count(False))


# -- two savers and a reader -----------------------------------------------------------------------


def savers(arguments: argparse.Namespace, sandbox: Path) -> Counter:
    folder = sandbox / "m"
    small_model(1).save_pretrained(folder)
    context = multiprocessing.get_context("spawn")
    stop, saves = context.Event(), context.Value("i", 0)
    workers = [context.Process(target=_save, args=(folder, s, stop, saves)) for s in (1, 2)]
    expected = {seed: features(small_model(seed)) for seed in (1, 2)}
    for worker in workers:
        worker.start()
    found: Counter = Counter(reads=0, first=0, second=0, mixed=0, missing=0, looks=0, absent=0)
    with ThreadPoolExecutor(1) as looking:
        look = looking.submit(_look, folder, stop, found)
        while not saves.value:  # the savers take seconds to start
            time.sleep(0.1)
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            found["reads"] += 1
            try:
                model = InterventionModel.from_pretrained(folder)
            except ArtifactError as error:
                print(error, file=sys.stderr)
                found["missing"] += 1
                continue
            computed = features(model)
            seeds = [seed for seed in expected if torch.equal(computed, expected[seed])]
            found["mixed" if seeds != [model.seed] else ["first", "second"][model.seed - 1]] += 1
        stop.set()
        look.result()
    for worker in workers:
        worker.join()
    small_model(1).save_pretrained(folder)  # what a reader kept in use is removed by now
    found["saves"] = saves.value
    found["left_behind"] = len(list(sandbox.iterdir())) - 1
    found["savers_failed"] = sum(worker.exitcode != 0 for worker in workers)
    return found


def kills(arguments: argparse.Namespace, sandbox: Path) -> Counter:
    """A process that saves again and again is killed at any moment."""
    folder, draw = sandbox / "m", random.Random(arguments.seed)
    small_model(1).save_pretrained(folder)
    expected = {seed: features(small_model(seed)) for seed in (1, 2)}
    context = multiprocessing.get_context("fork")
    stop, saves = context.Event(), context.Value("i", 0)
    found: Counter = Counter(kills=0, wrong=0, half_written=0)
    for _ in range(arguments.kills):
        worker = context.Process(target=_save, args=(folder, draw.choice((1, 2)), stop, saves))
        worker.start()
        time.sleep(draw.uniform(0.03, 0.3))
        worker.kill()
        worker.join()
        found["kills"] += 1
        found["half_written"] += len(list(sandbox.iterdir())) - 1
        model = InterventionModel.from_pretrained(folder)
        found["wrong"] += not torch.equal(features(model), expected[model.seed])
    small_model(1).save_pretrained(folder)
    found["saves"] = saves.value
    found["left_behind"] = len(list(sandbox.iterdir())) - 1
    return found


def _save(folder: Path, seed: int, stop: Any, saves: Any) -> None:
    torch.set_num_threads(1)
    model = small_model(seed)
    while not stop.is_set():
        model.save_pretrained(folder)
        with saves.get_lock():
            saves.value += 1


def _look(folder: Path, stop: Any, found: Counter) -> None:
    """Whether any program finds a model there at any time, without knowing of our locks."""
    while not stop.is_set():
        found["looks"] += 1
        found["absent"] += not (folder / "config.json").exists()
        time.sleep(1e-4)


def features(model: InterventionModel) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.encode(some_images(), task) for task in (None, *TASKS)])


# -- malformed configs -----------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def put(*path: Any) -> Change:
    """A change of the entry at a path of keys to the value that comes last."""
    *keys, last, value = path

    def change(config: dict[str, Any]) -> None:
        for key in keys:
            config = config[key]
        config[last] = value

    return change


def without(*path: Any) -> Change:
    *keys, last = path

    def change(config: dict[str, Any]) -> None:
        for key in keys:
            config = config[key]
        del config[last]

    return change


EDITS = "interventions/mnist.safetensors"
VISION = ("tower", "vision_config")
EITHER: list[Change] = [
    *(put("format", value) for value in (0, 3, "2", 2.5, None, True, [2], {})),
    *(put("tower", value) for value in (None, [], "clip", 7, {})),
    *(put("tower", "family", value) for value in ("siglip", None, 3, ["huggingface"])),
    *(put("tasks", value) for value in (None, "mnist", {}, 5, [None], [1, 2, 3], ["../../x"])),
    *(put("tasks", value) for value in (["mnist", "mnist"], ["mnist", "a/b"], ["unknown"])),
    *(put("interventions", value) for value in (None, [], {}, "attention", 3, {"head": {}})),
    *(put("interventions", "attention", value) for value in (None, [], "noreft", 3, {"ranks": 2})),
    *(put("interventions", "attention", "rank", v) for v in (0, -1, 33, 10**9, "2", 2.0, None)),
    *(put("interventions", "attention", "function", v) for v in ("reft", None, 3, ["noreft"])),
    *(put("interventions", "attention", "blocks", v) for v in ("some", [], [9], [[0]], {}, None)),
    *(put("interventions", "attention", "tokens", v) for v in ("cls", [], [99], ["a"], {}, None)),
    *(put("interventions", "mlp", "part", v) for v in ("half", [4], {"size": 10**9}, [[]], 5)),
    *(put("interventions", "mlp", "part", v) for v in ({"size": None}, {"sise": 3}, [8, 2])),
    *(put("interventions", "attention", "activation", v) for v in ("sine", 1, [], {})),
    *(put("interventions", "attention", "init", v) for v in ("zero", None, 1, [])),
    *(put("seed", value) for value in (None, "0", 1.5, [], True, float("nan"))),
    *(put("metadata", value) for value in (None, [], "none", 1)),
    *(put("files", value) for value in (None, [], {}, "all", {EDITS: None})),
    *(put("files", EDITS, value) for value in ("", "0" * 64, 5, "z" * 64, None)),
    put("files", "../../../etc/passwd", "0" * 64),
    put("unknown", 1),
    *(without(key) for key in ("format", "tower", "tasks", "interventions", "seed", "files")),
    without("files", EDITS),
    without("tower", "family"),
]
HUGGING_FACE: list[Change] = [
    *(put(*VISION, "hidden_size", v) for v in (0, -32, 48, 10**9, 10**30, "32", 32.5, None)),
    *(put(*VISION, "num_hidden_layers", v) for v in (0, 2, 10**9, "3", [], True)),
    *(put(*VISION, "num_attention_heads", v) for v in (0, 5, -4, 10**9, "4", None)),
    *(put(*VISION, "patch_size", v) for v in (0, 7, 64, -8, [8, 8], None)),
    *(put(*VISION, "image_size", v) for v in (0, 64, 10**9, "32", None)),
    *(put(*VISION, "intermediate_size", v) for v in (0, 65, 10**9, None)),
    *(put(*VISION, "hidden_act", v) for v in ("none", None, 3, ["gelu"])),
    *(put(*VISION, "layer_norm_eps", v) for v in (-1, "small", None, float("nan"), float("inf"))),
    *(put("tower", "projection_dim", v) for v in (0, 17, 10**9, "16", None)),
    *(put(*VISION[:1], "vision_config", v) for v in (None, [], "vit", 3)),
]
OPENCLIP: list[Change] = [
    *(put("tower", "width", v) for v in (0, 48, 10**9, "32", None)),
    *(put("tower", "layers", v) for v in (0, 2, 10**9, "3")),
    *(put("tower", "heads", v) for v in (0, 5, "4", None)),
    *(put("tower", "mlp_ratio", v) for v in (0, -1, 1e9, float("nan"), "2")),
    *(put("tower", "mean", v) for v in (None, [], [0.5], "grey", [0.5, 0.5, "0.5"])),
    *(put("tower", "std", v) for v in ([0, 0, 0], [float("inf")] * 3)),
    *(put("tower", "quick_gelu", v) for v in ("true", 1, None)),
    put("tower", "depth", 3),
]
RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"config"',
    b"2",
    b"\xff\xfe",
    b"\x00" * 100,
    b"[" * 100_000,
    b'{"format": 2, "a": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"format": ' + b"9" * 10_000 + b"}",
    b'{"format": 2}',
    b'{"format": 2, "digest": 5}',
    b'{"format": 1}',
]


def malformed(folder: Path, changes: list[Change]) -> Iterator[str]:
    """Put one malformed config.json after the other into a saved model, with a fitting digest."""
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    del saved["digest"]
    for number, change in enumerate(changes):
        config = copy.deepcopy(saved)
        change(config)
        config["digest"] = artifact._digest_of_config(config)
        path.write_text(json.dumps(config))
        yield f"change {number}: {path.read_text()[:20000]}"
    for content in RAW:
        path.write_bytes(content)
        yield repr(content[:60])


def configs(arguments: argparse.Namespace, sandbox: Path) -> Counter:
    found: Counter = Counter(loaded=0, refused=0, tracebacks=0)
    for openclip, changes in ((False, EITHER + HUGGING_FACE), (True, OPENCLIP)):
        folder = sandbox / ("openclip" if openclip else "huggingface")
        small_model(openclip=openclip).save_pretrained(folder)
        for what in malformed(folder, changes):
            found[outcome(folder, what)] += 1
    return found


PARTS = {part.__name__: part for part in (bits, names, threads, savers, kills, configs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS) + "; all of them")
    parser.add_argument("--seconds", type=float, default=60, help="of two savers and a reader")
    parser.add_argument("--bits", type=int, default=200)
    parser.add_argument("--encodes", type=int, default=1600)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.parts or PARTS:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; there are: {', '.join(PARTS)}")
        sandbox = Path(tempfile.mkdtemp(prefix="hostile-"))
        try:
            found = PARTS[name](arguments, sandbox)
        finally:
            shutil.rmtree(sandbox)
        print(f"{name}: " + ", ".join(f"{v:,} {k}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
