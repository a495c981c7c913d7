"""One stream of images of all tasks, and the classes of all tasks in one label space.

The task of an image is not given, unless a number says so. A class belongs to its task: ``one`` of
two tasks is two classes. The images may be spoilt, the same way every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.utils import count_parameters
from PIL import Image, ImageFilter
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..config import Json, Seed, Settings
from ..data import generator_of
from ..model.protocols import TaskConditionalModel
from .host import one_line
from .hosted import CLIPVisionModelTaskPool, encode_mixed, unseen_tasks
from .pools import Head, zero_shot_head

# Severity 1 to 5. Noise: standard deviation, of pixels from 0 to 1, as in ImageNet-C. Blur: radius
# of the Gaussian, as a share of the shorter side.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR = (0.01, 0.02, 0.03, 0.04, 0.06)


class StreamSettings(Settings):
    """The settings of a ``..._union`` task pool.

    Args:
        corruption: ``noise``, ``blur``, or null.
        severity: 1 to 5.
        stream_seed: decides the order of the images, and the noise.
    """

    corruption: Literal["noise", "blur"] | None = Field(
        default=None, description="null, noise, blur"
    )
    severity: Annotated[int, Field(ge=1, le=5, description="a whole number, 1 to 5")] = 3
    stream_seed: Seed = 0


class Corrupted(Dataset[Any]):
    """A data set whose images are spoilt; labels stay.

    Args:
        dataset: items are ``{"image": PIL.Image, "label": int}`` or pairs of both.
        task: its name; the noise follows from (seed, task, index).
        settings: what is done to the images.
    """

    def __init__(self, dataset: Sequence[Any], task: str, settings: StreamSettings):
        self.dataset, self.task, self.settings = dataset, task, settings

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, object]:
        item = self.dataset[index]
        image, label = (item["image"], item["label"]) if isinstance(item, dict) else item
        return {"image": self._corrupt(image.convert("RGB"), index), "label": label}

    def _corrupt(self, image: Image.Image, index: int) -> Image.Image:
        level = self.settings.severity - 1
        if self.settings.corruption == "blur":
            return image.filter(ImageFilter.GaussianBlur(BLUR[level] * min(image.size)))
        seed = generator_of(self.settings.stream_seed, f"noise {index}", self.task).initial_seed()
        pixels = np.asarray(image) / 255
        noise = np.random.default_rng(seed).normal(0, NOISE[level], pixels.shape)
        return Image.fromarray(np.uint8(np.clip(pixels + noise, 0, 1) * 255))


class Stream(Dataset[Any]):
    """All images of all tasks, shuffled: items are (pixels, task index, label)."""

    def __init__(self, datasets: Mapping[str, Sequence[Any]], seed: int):
        self.datasets = list(datasets.values())
        keys = [(task, row) for task, data in enumerate(self.datasets) for row in range(len(data))]
        order = torch.randperm(len(keys), generator=generator_of(seed, "stream", ""))
        self.keys = [keys[position] for position in order.tolist()]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        task, row = self.keys[index]
        pixels, label = self.datasets[task][row]
        return pixels, task, int(label)


class Tally:
    """Counts of right answers, per task and way of answering.

    Args:
        tasks: in the order of their indices.
    """

    def __init__(self, tasks: list[str]):
        self.tasks = tasks
        self.images = torch.zeros(len(tasks), dtype=torch.long)
        self.right: dict[str, Tensor] = {}
        # one more column: refused, as an image of no known task
        self.confusion = torch.zeros(len(tasks), len(tasks) + 1, dtype=torch.long)

    def count(self, name: str, right: Tensor, task_ids: Tensor) -> None:
        """Add a batch: whether each image (batch,) was right, and its task's index (batch,)."""
        sums = self.right.setdefault(name, torch.zeros_like(self.images))
        sums += torch.bincount(task_ids[right.cpu()], minlength=len(self.tasks))

    def report(self) -> Json:
        """Task -> its numbers; ``average``; ``confusion``, task -> answered task -> images."""
        seen = self.images > 0
        shares = {name: (right / self.images)[seen] for name, right in self.right.items()}
        # what the model reaches when nobody names the task; else the best that it has
        shown = next(name for name in ("routed", "given", "union") if name in shares)
        shares = {"accuracy": shares[shown], **shares}
        evaluated = [task for task, has in zip(self.tasks, seen.tolist(), strict=True) if has]
        report: Json = {
            task: {name: float(share[row]) for name, share in shares.items()}
            for row, task in enumerate(evaluated)
        }
        report["average"] = {name: float(share.mean()) for name, share in shares.items()}
        if "routing" in shares:
            columns = [*self.tasks, "none"]
            report["confusion"] = {
                task: {c: n for c, n in zip(columns, row, strict=True) if n}
                for task, row in zip(self.tasks, self.confusion.tolist(), strict=True)
            }
        return report


@torch.no_grad()
def measure(
    model: Any,
    heads: Mapping[str, Head],
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
) -> Json:
    """Evaluate a model on a stream.

    Args:
        model: a ``TaskConditionalModel``, perhaps with a router, or images -> image features.
        heads: task -> image features (batch, projection_dim) -> logits, on one scale for all.
        batches: of images, task indices and labels.
        device: where the images go.

    Returns:
        As ``Tally.report``. ``given``: the task is given; ``routed``: the router names it, and the
        class is one of the routed task; ``union``: the class is one of all tasks, from the routed
        task's features or, if the model needs no task, its own; ``routing``: the task is right, as
        routed or as the class says; ``accuracy``: the first that the model has of ``routed``,
        ``given``, ``union``.
    """
    tasks = list(heads)
    tally = Tally(tasks)
    conditional = isinstance(model, TaskConditionalModel)
    routes = getattr(model, "router", None) is not None
    for images, task_ids, labels in batches:
        images = images.to(device)
        tally.images += torch.bincount(task_ids, minlength=len(tasks))
        if conditional:
            features = encode_mixed(model, images, [tasks[index] for index in task_ids.tolist()])
            tally.count("given", _predicted(features, heads, task_ids).eq(labels), task_ids)
            if not routes:
                continue
        features = model.encode(images, "auto") if conditional else model(images)
        logits = [head(features).float().cpu() for head in heads.values()]
        sizes = torch.tensor([part.shape[1] for part in logits])
        start = sizes.cumsum(0) - sizes
        best = torch.cat(logits, dim=1).argmax(dim=1)
        tally.count("union", best.eq(start[task_ids] + labels), task_ids)
        if routes:
            index = {task: i for i, task in enumerate(tasks)}  # len(tasks) stands for none of them
            answer = torch.tensor([index.get(task, len(tasks)) for task in model.route(images)])
            known = answer < len(tasks)
            by_head = torch.stack([part.argmax(dim=1) for part in logits], dim=1)
            chosen = by_head.gather(1, answer.clamp_max(len(tasks) - 1)[:, None])[:, 0]
            tally.count("routed", known & answer.eq(task_ids) & chosen.eq(labels), task_ids)
        else:
            answer = torch.bucketize(best, sizes.cumsum(0), right=True)
        tally.count("routing", answer.eq(task_ids), task_ids)
        tally.confusion.index_put_((task_ids, answer), torch.ones_like(answer), accumulate=True)
    return tally.report()


def _predicted(features: Tensor, heads: Mapping[str, Head], task_ids: Tensor) -> Tensor:
    """Predicted class (batch,) from each image's task head."""
    classes = torch.zeros_like(task_ids)
    for index, head in enumerate(heads.values()):
        rows = task_ids == index
        if rows.any():
            classes[rows] = head(features[rows.to(features.device)]).argmax(dim=1).cpu()
    return classes


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
        """FusionBench's ``model_info``, and what ``measure`` says of the stream."""
        trainable, everything = count_parameters(model)
        info: Json = {"trainable_params": trainable, "all_params": everything}
        info |= {} if name is None else {"name": name}
        device = self.fabric.device
        model = model.to(device).eval()
        unseen = unseen_tasks(model, heads)
        if hasattr(self, "clip_model") and not isinstance(model, TaskConditionalModel):
            self.clip_model.vision_model = model
            model = HFCLIPClassifier(self.clip_model, self.processor).get_image_features
        report = measure(model, heads, self.batches(), device)
        for task in unseen & report.keys():
            report[task]["unseen"] = True
        return {"model_info": info, **report}

    def batches(self: Any) -> Iterator[Any]:
        """The stream in batches, corrupted if the settings say so."""
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
        """FusionBench's zero-shot heads, one per task; they need no vision model."""
        if not hasattr(self, "_zero_shot"):
            clip, processor, tasks = self.clip_model, self.processor, map(str, self.test_datasets)
            self._zero_shot = {task: zero_shot_head(clip, processor, task) for task in tasks}
        return self._zero_shot
