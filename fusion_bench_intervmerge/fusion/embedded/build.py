"""Builds the embedded pool once, in the user's cache, and finds it there ever after."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fusion_bench_intervmerge.cache import CACHE_VARIABLE, cache_root
from fusion_bench_intervmerge.errors import ConfigError

from . import training
from .recipe import Recipe
from .tasks import SIZE, TASKS
from .tokenizer import write_tokenizer

log = logging.getLogger(__name__)

POOL = "clip-vit-tiny_TA8"
DIGESTS = "digests.json"


def ensure_pool(seed: int = 0, root: Path | None = None, recipe: Recipe | None = None) -> Path:
    """The folder of the embedded pool, built on first use.

    The pool is built under another name and renamed once it is whole. Processes that ask for it
    meanwhile wait for the one that builds. One whose files are not as they were written (a disk, or
    a copy that was cut short) is built anew.

    Args:
        seed: decides images, initial weights and batches.
        root: the cache folder; :func:`cache_root` by default.
        recipe: for a pool of another size; ``seed`` takes the place of its own.

    Returns:
        a folder with ``pretrained/`` (a CLIPModel and its processor), ``experts/<task>/``
        (CLIPVisionModels), ``data/<task>.npz``, ``digests.json`` and ``recipe.json``.

    Raises:
        ConfigError: the cache folder cannot be written.
        RuntimeError: a worker failed.
    """
    recipe = replace(recipe or Recipe(), seed=seed)
    root = root or cache_root()
    folder = root / f"{POOL}-{recipe.digest()}"
    if _is_whole(folder):
        return folder
    with _locked(root, folder.name):
        if not _is_whole(folder):
            # Nobody else builds while we hold the lock: what lies here is left from a killed build.
            unfinished = root / f".{folder.name}.building"
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                _build(recipe, unfinished)
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


_found_sound: set[Path] = set()  # one look a process: it reads some 90 MB


def _is_whole(folder: Path) -> bool:
    if not (folder / "recipe.json").is_file():  # written last
        return False
    if folder not in _found_sound:
        for name in _damaged(folder):
            log.warning("%s is not as it was written; the embedded pool is built anew", name)
            return False
        _found_sound.add(folder)
    return True


def _damaged(folder: Path) -> Iterator[Path]:
    """The files that are gone or have changed; pools of before there were digests pass."""
    told = folder / DIGESTS
    if not told.is_file():
        return
    try:
        digests = json.loads(told.read_text(encoding="utf-8"))
    except ValueError:
        yield told
        return
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            yield path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Holds the pool's lock; it is the system's, so it goes with a killed process."""
    lock = FileLock(root / f".{name}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        problem = f"the cache folder {root} cannot be written ({error.strerror})"
        raise ConfigError(CACHE_VARIABLE, problem, "any folder you can write") from error
    try:
        yield
    finally:
        lock.release()


def _build(recipe: Recipe, folder: Path) -> None:
    """Draws the images, pre-trains, fine-tunes the experts, and writes ``recipe.json`` at last."""
    work = len(TASKS) * (
        sum(recipe.sizes().values()) + recipe.finetuning.steps * recipe.finetuning.batch_size
    ) + (recipe.pretraining.steps * recipe.pretraining.batch_size)
    title = f"building the embedded pool, once, in {folder.parent}"
    log.info("%s; this takes a few minutes", title)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with (
        tqdm(  # none in a log file
            total=work, desc=title, bar_format=bar_format, mininterval=1, disable=None
        ) as bar,
        # Workers are started first: they import torch while the images are drawn.
        _Workers(min(_cpus(), len(TASKS))) as workers,
    ):
        for name in TASKS:
            _draw(recipe, name, folder)
            bar.update(sum(recipe.sizes().values()))
        for _ in _pretrain(recipe, folder):
            bar.update(recipe.pretraining.batch_size)
        for _ in workers.finetune(recipe, folder):
            bar.update(recipe.finetuning.batch_size)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=2), encoding="utf-8")
    (folder / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")


def _draw(recipe: Recipe, name: str, folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for split, count in recipe.sizes().items():
        images, labels = TASKS[name].images(recipe.seed, split, count)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data" / f"{name}.npz", **arrays)


def _captions(name: str) -> list[list[str]]:
    return [TASKS[name].captions(label) for label in range(len(TASKS[name].classnames))]


def _pretrain(recipe: Recipe, folder: Path) -> Iterator[int]:
    """Writes ``pretrained/``; yields after each step."""
    target = folder / "pretrained"
    captions = [_captions(name) for name in TASKS]
    texts = [text for task in captions for texts in task for text in texts]
    tokenizer = write_tokenizer(target, texts, recipe.context)
    CLIPProcessor(_image_processor(), tokenizer).save_pretrained(target)
    images, labels = [], []
    for name in TASKS:
        with np.load(folder / "data" / f"{name}.npz") as data:
            images.append(torch.from_numpy(data["train_images"]))
            labels.append(torch.from_numpy(data["train_labels"]))
    # One thread: matrices this small gain little from more, and another number rounds differently.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = CLIPModel(_config(recipe, len(tokenizer)))
        yield from training.pretrain(
            model,
            tokenizer,
            images,
            labels,
            captions,
            seed=recipe.seed,
            **asdict(recipe.pretraining),
        )
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(target)


def _config(recipe: Recipe, vocabulary: int) -> CLIPConfig:
    """Both towers; all that OpenCLIP's ``CustomTextCLIP`` can hold as well."""
    common = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_attention_heads": recipe.width // recipe.head_width,
        "projection_dim": recipe.features,
        "hidden_act": "gelu",
    }
    text = {
        "num_hidden_layers": recipe.text_blocks,
        "vocab_size": vocabulary,
        "max_position_embeddings": recipe.context,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {
        "num_hidden_layers": recipe.blocks,
        "image_size": SIZE,
        "patch_size": recipe.patch_size,
    }
    return CLIPConfig(
        text_config=common | text,
        vision_config=common | vision,
        projection_dim=recipe.features,
    )


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[training.MEAN] * 3,
        image_std=[training.STD] * 3,
    )


def _cpus() -> int:
    """The CPUs this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Workers(ExitStack):
    """Processes that fine-tune experts beside each other, one thread each.

    They run :mod:`.training` by its path, so that neither this package nor the program that started
    the build is imported in them.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __enter__(self) -> _Workers:
        super().__enter__()
        # One pipe for all, output and errors: lines this short do not mix.
        lines, end = os.pipe()
        self.lines = self.enter_context(open(lines, encoding="utf-8", errors="replace"))
        program = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.processes = []
        for _ in range(self.count):
            process = subprocess.Popen(
                [sys.executable, "-c", program, training.__file__],
                stdin=subprocess.PIPE,
                stdout=end,
                stderr=end,
                env=environment,
                text=True,
            )
            self.callback(process.wait)
            self.callback(process.kill)
            self.processes.append(process)
        os.close(end)
        return self

    def finetune(self, recipe: Recipe, folder: Path) -> Iterator[None]:
        """Writes ``experts/``; yields after each step of any expert."""
        names = list(TASKS)
        for i, process in enumerate(self.processes):
            job = {
                "folder": str(folder.absolute()),
                "seed": recipe.seed,
                "stage": asdict(recipe.finetuning),
                "tasks": {name: _captions(name) for name in names[i :: self.count]},
            }
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died; what it said comes below
                process.stdin.write(json.dumps(job))
                process.stdin.close()
        said = ""
        for line in self.lines:
            if line.strip() in TASKS:
                yield
            elif line.strip():
                said = line.strip()
        if any(process.wait() for process in self.processes):
            raise RuntimeError(f"a worker of the embedded pool's build failed: {said}")
