"""One stream of images of all tasks, and the classes of all tasks in one label space.

No task is told, unless a number says so. A class belongs to its task: ``one`` of two tasks is two
classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.utils import count_parameters
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..config import Json
from ..data import generator_of
from ..model.protocols import TaskConditionalModel
from .corruption import Corrupted, StreamSettings
from .experts import Head, zero_shot_head
from .screen import one_line
from .taskpools import CLIPVisionModelTaskPool


class Stream(Dataset):
    """All images of all tasks, in an order of their own: items are (pixels, task index, label)."""

    def __init__(self, datasets: Mapping[str, Sequence], seed: int):
        self.datasets = list(datasets.values())
        keys = [(task, at) for task, data in enumerate(self.datasets) for at in range(len(data))]
        order = torch.randperm(len(keys), generator=generator_of(seed, "stream", ""))
        self.keys = [keys[at] for at in order.tolist()]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        task, at = self.keys[index]
        pixels, label = self.datasets[task][at]
        return pixels, task, int(label)


class Tally:
    """What was right of each task.

    Args:
        tasks: in the order of their indices.
    """

    def __init__(self, tasks: list[str]):
        self.tasks = tasks
        self.images = torch.zeros(len(tasks), dtype=torch.long)
        self.right: dict[str, Tensor] = {}
        # one more column: refused, as of no known task
        self.confusion = torch.zeros(len(tasks), len(tasks) + 1, dtype=torch.long)

    def count(self, name: str, right: Tensor, of: Tensor) -> None:
        """Add images (batch,) of tasks ``of`` (batch,) that were right or wrong in one way."""
        sums = self.right.setdefault(name, torch.zeros_like(self.images))
        sums += torch.bincount(of[right.cpu()], minlength=len(self.tasks))

    def report(self) -> Json:
        """Task -> its numbers; ``average``; ``confusion``, task -> told task -> images."""
        seen = self.images > 0
        shares = {name: (right / self.images)[seen] for name, right in self.right.items()}
        # what a model says of itself that nobody tells the task; else all that it can
        shown = next(name for name in ("routed", "given", "union") if name in shares)
        shares = {"accuracy": shares[shown], **shares}
        named = [task for task, at in zip(self.tasks, seen.tolist(), strict=True) if at]
        found: Json = {
            task: {name: float(share[row]) for name, share in shares.items()}
            for row, task in enumerate(named)
        }
        found["average"] = {name: float(share.mean()) for name, share in shares.items()}
        if "routing" in shares:
            columns = [*self.tasks, "none"]
            found["confusion"] = {
                task: {c: n for c, n in zip(columns, row, strict=True) if n}
                for task, row in zip(self.tasks, self.confusion.tolist(), strict=True)
            }
        return found


@torch.no_grad()
def measure(
    model: Any,
    heads: Mapping[str, Head],
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
) -> dict[str, object]:
    """Evaluate a model on a stream.

    Args:
        model: a ``TaskConditionalModel``, perhaps with a router, or images -> image features.
        heads: task -> image features (batch, projection_dim) -> logits, on one scale for all.
        batches: of images, task indices and labels.
        device: where the images go.

    Returns:
        As ``Tally.report``. ``given``: somebody tells the task; ``routed``: the router does, and
        the class is one of the routed task; ``union``: the class is one of all tasks, from the
        routed task's features or, where no task is asked for, the model's; ``routing``: the task
        is right, as routed or as the class says; ``accuracy``: the first that the model has of
        ``routed``, ``given``, ``union``.
    """
    tasks = list(heads)
    tally = Tally(tasks)
    conditional = isinstance(model, TaskConditionalModel)
    routes = getattr(model, "router", None) is not None
    sizes = None
    for images, of, labels in batches:
        images = images.to(device)
        tally.images += torch.bincount(of, minlength=len(tasks))
        if conditional:
            features = model.encode(images, [tasks[index] for index in of.tolist()])
            tally.count("given", _own_class(features, heads, of).eq(labels), of)
            if not routes:
                continue
        features = model.encode(images, "auto") if conditional else model(images)
        logits = [head(features).float().cpu() for head in heads.values()]
        sizes = torch.tensor([part.shape[1] for part in logits])
        start = sizes.cumsum(0) - sizes
        best = torch.cat(logits, dim=1).argmax(dim=1)
        tally.count("union", best.eq(start[of] + labels), of)
        if routes:
            places = {task: at for at, task in enumerate(tasks)}  # the one behind: none of these
            told = torch.tensor([places.get(task, len(tasks)) for task in model.route(images)])
            known = told < len(tasks)
            own = torch.stack([part.argmax(dim=1) for part in logits], dim=1)
            chosen = own.gather(1, told.clamp_max(len(tasks) - 1)[:, None])[:, 0]
            tally.count("routed", known & told.eq(of) & chosen.eq(labels), of)
        else:
            told = torch.bucketize(best, sizes.cumsum(0), right=True)
        tally.count("routing", told.eq(of), of)
        tally.confusion.index_put_((of, told), torch.ones_like(of), accumulate=True)
    return tally.report()


def _own_class(features: Tensor, heads: Mapping[str, Head], of: Tensor) -> Tensor:
    """The class that each image's own head finds (batch,)."""
    found = torch.zeros_like(of)
    for index, head in enumerate(heads.values()):
        rows = of == index
        if rows.any():
            found[rows] = head(features[rows.to(features.device)]).argmax(dim=1).cpu()
    return found


class Union:
    """What the ``..._union`` task pools of both families have in common.

    Args:
        args, settings: FusionBench's pool's, and those of ``StreamSettings``.
    """

    @one_line
    def __init__(self, *args: object, **settings: object):
        own = {k: settings.pop(k) for k in StreamSettings.model_fields if k in settings}
        self.stream = StreamSettings.read(own, "taskpool")
        super().__init__(*args, **settings)

    def report(self: Any, model: Any, heads: Any, name: str | None = None) -> Json:
        """FusionBench's ``model_info``, and what ``measure`` finds on the stream."""
        trainable, everything = count_parameters(model)
        info: Json = {"trainable_params": trainable, "all_params": everything}
        info |= {} if name is None else {"name": name}
        device = self.fabric.device
        model = model.to(device).eval()
        if hasattr(self, "clip_model") and not isinstance(model, TaskConditionalModel):
            self.clip_model.vision_model = model
            model = HFCLIPClassifier(self.clip_model, self.processor).get_image_features
        return {"model_info": info, **measure(model, heads, self.batches(), device)}

    def batches(self: Any) -> Iterator[Any]:
        """The stream in batches, spoilt where the settings say so."""
        datasets = self.test_datasets
        if self.stream.corruption is not None:
            for task, data in datasets.items():
                if not isinstance(data.dataset, Corrupted):
                    data.dataset = Corrupted(data.dataset, task, self.stream)
        stream = Stream(datasets, self.stream.stream_seed)
        options = {k: v for k, v in dict(self._dataloader_kwargs).items() if k != "shuffle"}
        loader = tqdm(DataLoader(stream, **options), desc="Evaluating the stream", leave=False)
        return itertools.islice(loader, 1) if self.fast_dev_run else iter(loader)


class UnionCLIPVisionModelTaskPool(Union, CLIPVisionModelTaskPool):
    """One stream of all tasks' images, classified among all tasks' classes; Hugging Face."""

    @one_line
    def evaluate(self, model: Any, name: str | None = None, **kwargs: object) -> Json:
        """As ``measure``, with ``model_info``."""
        if not self._is_setup:
            self.setup()
        return self.report(model, self._heads(), name)

    def _heads(self) -> dict[str, Head]:
        """FusionBench's zero-shot heads, one a task; they need no vision model."""
        if not hasattr(self, "_zero_shot"):
            clip, processor, tasks = self.clip_model, self.processor, map(str, self.test_datasets)
            self._zero_shot = {task: zero_shot_head(clip, processor, task) for task in tasks}
        return self._zero_shot
