"""One stream of images of all tasks, and the classes of all tasks in one label space.

The task of an image is not given, unless a number says so. A class belongs to its task: ``one`` of
two tasks is two classes. The images may be spoilt, the same way every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
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
from .hosted import CLIPVisionModelTaskPool, OneTask, encode_mixed
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
    """A data set whose images are spoilt, in ``{"image": PIL.Image, "label": int}``; labels stay.

    The noise follows from (seed, task, index).
    """

    def __init__(self, dataset: Sequence[Any], task: str, settings: StreamSettings):
        self.dataset, self.task, self.settings = dataset, task, settings

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, object]:
        item, settings = self.dataset[index], self.settings
        image, label = (item["image"], item["label"]) if isinstance(item, dict) else item
        image, level = image.convert("RGB"), settings.severity - 1
        if settings.corruption == "blur":
            image = image.filter(ImageFilter.GaussianBlur(BLUR[level] * min(image.size)))
        else:
            seed = generator_of(settings.stream_seed, f"noise {index}", self.task).initial_seed()
            pixels = np.asarray(image) / 255
            noise = np.random.default_rng(seed).normal(0, NOISE[level], pixels.shape)
            image = Image.fromarray(np.uint8(np.clip(pixels + noise, 0, 1) * 255))
        return {"image": image, "label": label}


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


@torch.no_grad()
def measure(
    model: Any,
    heads: Mapping[str, Head],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
) -> Json:
    """Evaluate a model on a stream.

    Args:
        model: a ``TaskConditionalModel``, perhaps with a router, or images -> image features.
        heads: task -> image features (batch, projection_dim) -> logits, on one scale for all.
        batches: of images, task indices and labels.
        device: where the images go.

    Returns:
        Task -> shares of right answers; ``average``; ``confusion``, task -> answered task ->
        images. ``given``: the task is given; ``routed``: the router names it, and the class is one
        of the routed task; ``union``: the class is one of all tasks, from the routed task's
        features or, if the model needs no task, its own; ``routing``: the task is right, as routed
        or as the class says; ``accuracy``: the first that the model has of ``routed``, ``given``,
        ``union``.
    """
    tasks, parts = list(heads), []
    conditional = isinstance(model, TaskConditionalModel)
    routes = getattr(model, "router", None) is not None
    for images, task_ids, labels in batches:
        images, row = images.to(device), {"task": task_ids}
        if conditional:
            features = encode_mixed(model, images, [tasks[index] for index in task_ids.tolist()])
            row["given"] = _predicted(features, heads, task_ids).eq(labels)
        if routes or not conditional:
            features = model.encode(images, "auto") if conditional else model(images)
            logits = [head(features).float().cpu() for head in heads.values()]
            sizes = torch.tensor([part.shape[1] for part in logits])
            best = torch.cat(logits, dim=1).argmax(dim=1)
            start = sizes.cumsum(0) - sizes
            answer = torch.bucketize(best, start, right=True) - 1
            row["union"] = best.eq(start[task_ids] + labels)
            if routes:
                index = {task: i for i, task in enumerate(tasks)}  # len(tasks): none of them
                answer = torch.tensor([index.get(t, len(tasks)) for t in model.route(images)])
                right = _predicted(features, heads, task_ids).eq(labels)
                row["routed"] = right & answer.eq(task_ids)
            row |= {"routing": answer.eq(task_ids), "answer": answer}
        parts.append(pd.DataFrame({key: column.numpy() for key, column in row.items()}))
    rows = pd.concat(parts)
    counts = pd.crosstab(rows["task"], rows.pop("answer")) if "answer" in rows else None
    shares = rows.groupby("task").mean()
    # what the model reaches when nobody names the task; else the best that it has
    shown = next(name for name in ("routed", "given", "union") if name in shares)
    shares.insert(0, "accuracy", shares[shown])
    report: Json = {tasks[row]: own.to_dict() for row, own in shares.iterrows()}
    report["average"] = shares.mean().to_dict()
    if counts is not None:
        names = [*tasks, "none"]
        report["confusion"] = {
            tasks[row]: {names[answer]: int(n) for answer, n in own.items() if n}
            for row, own in counts.iterrows()
        }
    return report


def _predicted(features: Tensor, heads: Mapping[str, Head], task_ids: Tensor) -> Tensor:
    """Predicted class (batch,) from each image's task head."""
    classes = torch.zeros_like(task_ids)
    for index, head in enumerate(heads.values()):
        rows = task_ids == index
        if rows.any():
            classes[rows] = head(features[rows.to(features.device)]).argmax(dim=1).cpu()
    return classes


class Union:
    """A task pool of FusionBench's with ``StreamSettings``, for both families."""

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
        encoder = model
        projects = isinstance(model, (TaskConditionalModel, OneTask))
        if hasattr(self, "clip_model") and not projects:
            self.clip_model.vision_model = model
            encoder = HFCLIPClassifier(self.clip_model, self.processor).get_image_features
        report = measure(encoder, heads, self.batches(), device)
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
        if not hasattr(self, "_heads"):  # zero-shot ones, which need no vision model
            clip, processor, tasks = self.clip_model, self.processor, map(str, self.test_datasets)
            self._heads = {task: zero_shot_head(clip, processor, task) for task in tasks}
        return self.finish(self.report(model, self._heads, name), model, self._pretrained)
