"""Which images are learned from, in which order, and reading them: for solving and distillation."""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from typing_extensions import Self

from .config import ConfigError, Fraction, Json, Seed, Settings, whole
from .files import PREFIX, atomic_file

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)

# the type to compute in, by the beginning of Fabric's precision
DTYPES = {
    "64": torch.float64,
    "32": torch.float32,
    "bf16": torch.bfloat16,
    "16": torch.float16,
}


class DataSettings(Settings):
    """The unlabelled images to learn from.

    Args:
        split: ``test``, ``validation`` or ``train``: where they come from.
        fraction: share of that split that may be seen; the same images for every method at a seed.
        images: at most so many images per task; null: as many as ``fraction`` says.
        batch_size: images per task and step, over all processes.
        num_workers: processes that decode images.
        cache_gb: GiB of memory for the states of images that are seen again.
    """

    split: Literal["test", "validation", "train"] = "test"
    fraction: Fraction = 1.0
    images: Annotated[int | None, whole(1, 10**9, before="null, or ")] = None
    batch_size: Annotated[int, whole(1, 10**6)] = 16
    num_workers: Annotated[int, whole(0, 1024)] = 0
    cache_gb: Annotated[float, Field(ge=0, le=10**6, description="a number, 0 or more")] = 2.0


class RepairSettings(Settings):
    """What solving and training have in common.

    Args:
        data: the unlabelled images to learn from (``DataSettings``).
        seed: decides initial edits, images and their order.
    """

    data: DataSettings = DataSettings()
    seed: Seed = 0

    @classmethod
    def of(cls, settings: Self | None, keywords: Mapping[str, object]) -> Self:
        """Settings as an object, or by keywords: those of ``data`` may be among them.

        Raises:
            ConfigError: a setting that does not exist, or not with that value.
            TypeError: both an object and keywords.
        """
        if settings is not None and keywords:
            raise TypeError(f"settings as an object, and also by keyword: {', '.join(keywords)}")
        if settings is not None:
            return settings
        inner = {key: keywords[key] for key in DataSettings.model_fields if key in keywords}
        own = {key: value for key, value in keywords.items() if key not in inner}
        data = DataSettings.read(own.get("data", {}), "data").to_dict() | inner
        return cls.read(own | {"data": data})


class ImageDataset(Protocol):
    """A task's images: pixel values, or (pixel values, anything), by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


Datasets = Mapping[str, ImageDataset]  # by task
ImageKey = tuple[str, int]  # task, index


def generator_of(seed: int, *purpose: str) -> torch.Generator:
    """Random numbers for one purpose and task, whatever else is drawn."""
    digest = hashlib.sha256(" ".join([str(seed), *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def choose_images(task: str, available: int, data: DataSettings, seed: int = 0) -> list[int]:
    """Indices of the images that may be seen, in random order.

    They follow from (seed, task, number of images ``available``) alone, so that every method sees
    the same ones; a smaller share (Table 8 of the paper) is the beginning of a larger one.

    Raises:
        ConfigError: there are no images.
    """
    if available < 1:
        raise ConfigError("modelpool", f"task {task!r} has no images in this split")
    order = torch.randperm(available, generator=generator_of(seed, "subset", task))
    return order[: math.ceil(data.fraction * available)][: data.images].tolist()


class Schedule:
    """One task's images, step by step.

    It follows from (seed, task, number of images) alone: every method sees the same images at a
    seed, whatever other tasks there are. Without steps, ``unique`` has all that may be seen.

    Attributes:
        unique: dataset indices of the images seen, in the order of their first use.
        rows: (steps, batch_size), positions in ``unique``.
    """

    def __init__(self, task: str, num_images: int, steps: int, data: DataSettings, seed: int = 0):
        subset = torch.tensor(choose_images(task, num_images, data, seed))
        order = generator_of(seed, "order", task)
        needed = steps * data.batch_size or len(subset)
        epochs = [
            subset[torch.randperm(len(subset), generator=order)]
            for _ in range(math.ceil(needed / len(subset)))
        ]
        seen = torch.cat(epochs)[:needed].tolist()
        self.unique: list[int] = list(dict.fromkeys(seen))
        position = {image: row for row, image in enumerate(self.unique)}
        rows = torch.tensor([position[image] for image in seen])
        self.rows: Tensor = rows[: steps * data.batch_size].view(steps, data.batch_size)


class _Pixels(Dataset["Tensor | ConfigError"]):
    """Images of several tasks, addressed by (task, index); labels are left behind.

    An image that cannot be read is its error: a worker process would send nothing but a trace.
    """

    def __init__(self, datasets: Datasets):
        self.datasets = datasets

    def __getitem__(self, key: ImageKey) -> Tensor | ConfigError:
        try:
            item = self.datasets[key[0]][key[1]]
        except ConfigError as error:
            return error
        return cast(Tensor, item[0] if isinstance(item, (tuple, list)) else item)


def _collate(items: list[Tensor | ConfigError]) -> Tensor | ConfigError:
    errors = [item for item in items if isinstance(item, ConfigError)]
    return errors[0] if errors else default_collate(items)


def read_images(
    datasets: Datasets, batches: Sequence[Sequence[ImageKey]], num_workers: int
) -> Iterator[Tensor]:
    """Batches of images, decoded in worker processes ahead of their use.

    Raises:
        ConfigError: an image that cannot be read, as its data set says it.
    """
    # A sampler that is a list of batches; DataLoader has no name for that but batch_sampler.
    loader = DataLoader(
        _Pixels(datasets),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    return map(_or_raise, iter(loader))


def _or_raise(batch: Tensor | ConfigError) -> Tensor:
    if isinstance(batch, ConfigError):
        raise batch
    return batch


class ImageStore:
    """The states at which a training starts, for every image of every task.

    They are made when a task's images are first read, and saved up to a limit of memory; images
    beyond it are read again whenever they are needed.

    Args:
        datasets, schedules: by task.
        prepare: images (batch, 3, height, width) -> states (batch, ...).
        limit: bytes of states that may be saved in memory, over all tasks.
        num_workers: worker processes that decode images.
    """

    def __init__(
        self,
        datasets: Datasets,
        schedules: Mapping[str, Schedule],
        prepare: Callable[[Tensor], Tensor],
        limit: float,
        num_workers: int,
    ):
        self.datasets, self.schedules, self.prepare = datasets, schedules, prepare
        self.num_workers, self._limit = num_workers, limit / max(1, len(schedules))
        self._saved: dict[str, Tensor] = {}

    def read(self, task: str, batch_size: int) -> Iterator[Tensor]:
        """A task's images (batch, 3, height, width), in the order of their first use.

        Their states are saved.
        """
        unique = self.schedules[task].unique
        starts = range(0, len(unique), batch_size)
        batches = [[(task, index) for index in unique[i : i + batch_size]] for i in starts]
        room = len(unique)
        reader = read_images(self.datasets, batches, self.num_workers)
        for start, images in zip(starts, reader, strict=True):
            if start < room:
                states = self.prepare(images)
                if start == 0:
                    room = min(int(self._limit // states[0].nbytes), room)
                    shape = (room, *states.shape[1:])
                    self._saved[task] = torch.empty(shape, dtype=states.dtype)
                place = self._saved[task][start : start + batch_size]
                place.copy_(states[: len(place)])
            yield images

    def states(self, plan: Sequence[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """States for one forward pass after another, once every task's images were read.

        The plan has for each pass task -> rows (positions in that task's ``unique``); states come
        in the order of its tasks and rows.
        """
        missing = [
            [
                (task, self.schedules[task].unique[row])
                for task, rows in tasks.items()
                for row in rows[rows >= len(self._saved[task])].tolist()
            ]
            for tasks in plan
        ]
        reader = read_images(self.datasets, [keys for keys in missing if keys], self.num_workers)
        for tasks, keys in zip(plan, missing, strict=True):
            saved = [(self._saved[task], rows) for task, rows in tasks.items()]
            if not keys:
                yield torch.cat([states[rows] for states, rows in saved])
                continue
            is_saved = torch.cat([rows < len(states) for states, rows in saved])
            known = torch.cat([states[rows[rows < len(states)]] for states, rows in saved])
            both = known.new_empty(len(is_saved), *known.shape[1:])
            both[is_saved], both[~is_saved] = known, self.prepare(next(reader)).cpu()
            yield both


class ImageStates:
    """A task's images between two blocks: batches of states, replaced as the images move on.

    What does not fit in memory is in temporary files, mapped into memory and removed with this
    object.

    Args:
        room: bytes that may be held in memory.
        device: where batches are computed.
    """

    def __init__(self, room: float, device: torch.device):
        self._room, self._device = room, device
        self._batches: list[Tensor] = []
        self._mapped: dict[int, Tensor] = {}  # a batch's file, flat
        self._folder = tempfile.TemporaryDirectory(prefix="states-")

    def append(self, states: Tensor) -> None:
        """Add a batch."""
        index, count = len(self._batches), states.numel()
        self._batches.append(states)
        self._room -= count * states.element_size()
        if self._room < 0:
            path = str(Path(self._folder.name) / str(index))
            self._mapped[index] = torch.from_file(path, shared=True, size=count, dtype=states.dtype)
            self[index] = states

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (states.to(self._device) for states in self._batches)

    def __setitem__(self, index: int, states: Tensor) -> None:
        """Replace a batch by one of the same shape, or of fewer tokens."""
        if index in self._mapped:
            states = self._mapped[index][: states.numel()].view(states.shape).copy_(states)
        self._batches[index] = states

    def move(self, step: Callable[[Tensor], Tensor]) -> None:
        """Replace every batch by what a step makes of it."""
        for index, states in enumerate(self):
            self[index] = step(states)


def progress_bar(fabric: L.Fabric, name: str, total: int, done: int = 0) -> tqdm:
    """A bar on stderr, in the first process alone, and nothing at all in a log file."""
    hidden = None if fabric.is_global_zero else True  # None: unless there is a terminal
    return tqdm(desc=name, total=total, initial=done, disable=hidden, dynamic_ncols=True)


def computing_dtype(fabric: L.Fabric) -> torch.dtype:
    """The type to compute in, by Fabric's precision.

    Raises:
        ConfigError: a precision that is not supported.
    """
    precision = str(getattr(fabric._precision, "precision", "32-true"))
    if precision.partition("-")[0] not in DTYPES:
        raise ConfigError(
            "fabric.precision", f"{precision!r}", "64-true, 32-true, bf16-true, 16-mixed"
        )
    return DTYPES[precision.partition("-")[0]]


# -- a run that may be stopped ---------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message, one line, says what goes on from where."""


# What torch raises for a file that it did not write, and what a file of other things breaks.
_UNUSABLE = (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass
class RunFolder:
    """Where a run keeps what it has done until its result is saved: the same call goes on from it.

    Attributes:
        path: the folder; it is made when something is kept.
        run: what identifies the run; a file of another run is not taken.
        progress: in words, what is kept, for whoever stops the run; empty: nothing.
    """

    path: Path
    run: str
    progress: str = ""

    def file(self, name: str) -> Path:
        """Where the run keeps something of that name."""
        return self.path / f"state-{name}"

    def save(self, name: str, state: Json) -> bool:
        """Keep tensors and plain values under a name; whether that was possible.

        If not (a full disk, say), it is logged, and what was there stays.
        """
        try:
            with atomic_file(self.file(f"{name}.pt")) as temporary:
                torch.save({"run": self.run, **state}, temporary)
        except (ConfigError, OSError, RuntimeError) as error:
            log.warning("%s was not kept: %s", name, error)
            return False
        return True

    def load(self, name: str) -> Json | None:
        """What was kept under a name; a file that is torn or of another run is logged and left."""
        path = self.file(f"{name}.pt")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["run"] != self.run:
                raise ValueError("it belongs to another run")
        except FileNotFoundError:
            return None
        except (*_UNUSABLE, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("%s is not used: %s", path, reason)
            return None
        return cast(Json, state)

    def clear(self) -> None:
        """Remove the files, once the run's result is saved elsewhere."""
        for hidden in self.path.glob(f"{PREFIX}*"):  # half a file of a process that was killed
            shutil.rmtree(hidden, ignore_errors=True)
        for path in self.path.glob("state-*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # others' files are in it, or it was never made
            self.path.rmdir()


@contextmanager
def interruptible(doing: str, folder: RunFolder | None = None) -> Iterator[None]:
    """Turn Ctrl-C inside into an ``Interrupted`` that says what was being done and what is kept."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        more = f"; {folder.progress}" if folder is not None and folder.progress else ""
        raise Interrupted(f"stopped while {doing}{more}") from None


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C, which then waits for the step's end; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
