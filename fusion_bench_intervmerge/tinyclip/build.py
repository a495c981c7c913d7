"""Builds an embedded pool once, in the user's cache, and finds it there ever after."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel

from ..config import ConfigError
from ..files import CACHE_VARIABLE, cache_root
from . import shipped, training
from .material import sha256
from .mini import Collection
from .pools import TINY, Pool
from .processor import write_processor
from .recipe import Recipe
from .tasks import SIZE
from .tokenizer import write_tokenizer

log = logging.getLogger(__name__)

DIGESTS = "digests.json"


def ensure_pool(
    seed: int = 0, pool: str | Pool = TINY.name, root: Path | None = None, *, train: bool = False
) -> Path:
    """The folder of an embedded pool, built on first use, or unpacked where its weights ship.

    The pool is built under another name and renamed once it is whole. Processes that ask for it
    meanwhile wait for the one that builds. What a killed build had finished (the images, the
    pretrained encoder, an expert) is taken up by the next. One whose files are not as they were
    written (a disk, or a copy that was cut short) is built anew.

    Args:
        seed: decides images, initial weights and batches.
        pool: a name of :data:`.pools.POOLS`, or one of another recipe.
        root: the cache folder; :func:`cache_root` by default.
        train: build it from its recipe even where its weights ship.

    Returns:
        a folder with ``pretrained/`` (a CLIPModel and its processor), ``experts/<task>/``
        (CLIPVisionModels), ``data/<task>.npz``, ``digests.json`` and ``recipe.json``.

    Raises:
        ConfigError: no such pool, or the cache folder cannot be written.
        RuntimeError: a worker failed.
    """
    pool = Pool.named(pool, seed) if isinstance(pool, str) else pool.seeded(seed)
    root = root or cache_root()
    folder = root / f"{pool.name}-{pool.digest()}"
    if _is_whole(folder):
        return folder
    with _locked(root, folder.name):
        if not _is_whole(folder):
            unfinished = root / f".{folder.name}.building"
            _build(pool, unfinished, train)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    return folder


_found_sound: set[Path] = set()  # one look a process: it reads some 90 MB


def _is_whole(folder: Path) -> bool:
    if not (folder / "recipe.json").is_file():  # written last
        return False
    if folder not in _found_sound:
        for name in _damaged(folder):
            log.warning("%s is not as it was written; the pool is built anew", name)
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
        if not path.is_file() or sha256(path) != digest:
            yield path


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


def _build(pool: Pool, folder: Path, train: bool) -> None:
    """Does what is left to do in a folder, and writes ``recipe.json`` at last."""
    for part in folder.rglob("*.part"):  # nobody else builds while we hold the lock
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    recipe, sizes = pool.recipe, sum(pool.recipe.sizes().values())
    tuning, training_ = recipe.finetuning, recipe.pretraining
    work = len(pool.tasks) * (sizes + tuning.steps * tuning.batch_size)
    title = f"building {pool.name}, once, in {folder.parent}"
    takes = "a few minutes" if train or not shipped.has(pool) else "some seconds"
    log.info("%s; this takes %s", title, takes)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(  # none in a log file
        total=work + training_.steps * training_.batch_size,
        desc=title,
        bar_format=bar_format,
        mininterval=1,
        disable=None,
    ) as bar:
        for name in pool.tasks:
            _draw(pool, name, folder)
            bar.update(sizes)
        if train or not shipped.has(pool):
            _train(pool, folder, bar)
        else:
            shipped.unpack(pool, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=2), encoding="utf-8")
    (folder / "recipe.json").write_text(pool.to_json(), encoding="utf-8")


def _train(pool: Pool, folder: Path, bar: tqdm) -> None:
    missing = [name for name in pool.tasks if not (folder / "experts" / name).is_dir()]
    # Workers are started first: they import torch while the encoder is trained.
    with _Workers(min(_cpus(), len(missing))) as workers:
        if not (folder / "pretrained").is_dir():
            for _ in _pretrain(pool, folder):
                bar.update(pool.recipe.pretraining.batch_size)
        for _ in workers.finetune(pool, missing, folder):
            bar.update(pool.recipe.finetuning.batch_size)


def _draw(pool: Pool, name: str, folder: Path) -> None:
    path = folder / "data" / f"{name}.npz"
    if path.is_file():
        return
    arrays: dict[str, np.ndarray] = {}
    for split, count in pool.recipe.sizes().items():
        images, labels = pool.tasks[name].images(pool.recipe.seed, split, count)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.rename(path)


def _captions(pool: Pool, name: str) -> list[list[str]]:
    task = pool.tasks[name]
    return [task.captions(label) for label in range(len(task.classnames))]


def _collections(pool: Pool, folder: Path) -> Iterator[Collection]:
    if pool.collections:
        yield from pool.collections(pool.recipe)
        return
    for name in pool.tasks:
        with np.load(folder / "data" / f"{name}.npz") as data:
            yield Collection(data["train_images"], data["train_labels"], _captions(pool, name))


def _pretrain(pool: Pool, folder: Path) -> Iterator[int]:
    """Writes ``pretrained/``; yields after each step."""
    recipe = pool.recipe
    target = folder / "pretrained.part"
    collections = list(_collections(pool, folder))
    texts = [text for some in collections for names in some.captions for text in names]
    tokenizer = write_tokenizer(target, texts, recipe.context)
    write_processor(tokenizer, target)
    # One thread: matrices this small gain little from more, and another number rounds differently.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = CLIPModel(clip_config(recipe, len(tokenizer)))
        yield from training.pretrain(
            model,
            tokenizer,
            [torch.from_numpy(some.images) for some in collections],
            [torch.from_numpy(some.labels) for some in collections],
            [some.captions for some in collections],
            seed=recipe.seed,
            **asdict(recipe.pretraining),
        )
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(target)
    target.rename(folder / "pretrained")


def clip_config(recipe: Recipe, vocabulary: int) -> CLIPConfig:
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

    def finetune(self, pool: Pool, names: Sequence[str], folder: Path) -> Iterator[None]:
        """Writes ``experts/<name>/``; yields after each step of any expert."""
        for i, process in enumerate(self.processes):
            job = {
                "folder": str(folder.absolute()),
                "seed": pool.recipe.seed,
                "stage": asdict(pool.recipe.finetuning),
                "tasks": {name: _captions(pool, name) for name in names[i :: self.count]},
            }
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died; what it said comes below
                process.stdin.write(json.dumps(job))
                process.stdin.close()
        said = ""
        for line in self.lines:
            if line.strip() in pool.tasks:
                yield
            elif line.strip():
                said = line.strip()
        if any(process.wait() for process in self.processes):
            raise RuntimeError(f"a worker of the build failed: {said}")
