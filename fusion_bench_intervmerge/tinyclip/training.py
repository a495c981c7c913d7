"""Pre-training and fine-tuning of the embedded pool's encoders.

This file is also a program: :mod:`.build` starts it by its path, several at once, to fine-tune the
experts beside each other. It imports torch and transformers alone, so that a worker starts fast and
whatever started the build (a console script, pytest, a notebook) is not imported again.

Every expert is trained by one thread with a random generator of its own: the result does not
depend on how many workers share the tasks.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast, CLIPVisionModel, PreTrainedModel

# Pixel statistics of the drawn images, rounded; the image processor takes them from here.
MEAN, STD = 0.5, 0.28

OTHERS = 400  # images of each other task whose features a gentle fine-tuning keeps


def pixel_values(images: Tensor) -> Tensor:
    """What the image processor makes of images that have the right size already.

    Args:
        images: uint8, (batch, height, width, 3).

    Returns:
        float32, (batch, 3, height, width), standardised.
    """
    return (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def pretrain(
    model: CLIPModel,
    tokenizer: CLIPTokenizerFast,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    captions: Sequence[Sequence[Sequence[str]]],
    *,
    seed: int,
    batch_size: int,
    **stage: Any,
) -> Iterator[int]:
    """Contrastive pre-training of both towers on the images of all tasks, mixed.

    A class has several captions, all of them true. For each step every task settles on one, so
    that no image is pushed away from a true one; images that share a caption share its positives.

    Args:
        images, labels: per task, uint8 (n, size, size, 3) and int64 (n,).
        captions: ``captions[task][label]`` is the list of captions of that class.

    Yields:
        the number of each step, once it is done.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = [
        [tokenizer(texts, padding="max_length", return_tensors="pt") for texts in task]
        for task in captions
    ]
    pool = torch.cat(list(images))
    task_of = torch.cat([torch.full((len(y),), t) for t, y in enumerate(labels)])
    label_of = torch.cat(list(labels))

    def loss() -> Tensor:
        batch = torch.randint(len(pool), (batch_size,), generator=generator)
        pick = torch.randint(1 << 16, (len(captions),), generator=generator).tolist()
        pairs = torch.stack([task_of[batch], label_of[batch]], dim=1)
        present, caption = pairs.unique(dim=0, return_inverse=True)
        chosen = [tokens[t][y] for t, y in present.tolist()]
        rows = [pick[t] % len(tokens[t][y].input_ids) for t, y in present.tolist()]
        text = model.get_text_features(
            torch.stack([c.input_ids[r] for c, r in zip(chosen, rows, strict=True)])
        )
        image = model.get_image_features(pixel_values(pool[batch]))
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        positives = F.one_hot(caption, len(present)).float()
        to_image = -(logits.log_softmax(dim=0) * positives / positives.sum(0)).sum(0).mean()
        return 0.5 * (F.cross_entropy(logits, caption) + to_image)

    yield from _optimize(list(model.parameters()), loss, **stage)


def finetune(
    model: CLIPModel,
    head: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    batch_size: int,
    others: Tensor | None = None,
    keep: float = 0.0,
    keep_batch_size: int = 0,
    **stage: Any,
) -> Iterator[int]:
    """Trains the vision tower, and nothing else, to classify with a frozen zero-shot head.

    Args:
        head: (classes, features), rows of unit length; see :func:`zero_shot_head`.
        images, labels: uint8 (n, size, size, 3) and int64 (n,).
        others: uint8 (m, size, size, 3), images whose features are to stay what they are now.
        keep: weight of the cosine distance of ``keep_batch_size`` of those from what they were.

    Yields:
        the number of each step, once it is done.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    scale = model.logit_scale.exp()
    if keep and others is not None:
        with torch.no_grad():
            before = torch.cat([_unit_features(model, some) for some in others.split(256)])

    def loss() -> Tensor:
        batch = torch.randint(len(images), (batch_size,), generator=generator)
        if not keep or others is None:
            features = _unit_features(model, images[batch])
            return F.cross_entropy(scale * features @ head.T, labels[batch])
        kept = torch.randint(len(others), (keep_batch_size,), generator=generator)
        features = _unit_features(model, torch.cat([images[batch], others[kept]]))
        wrong = F.cross_entropy(scale * features[:batch_size] @ head.T, labels[batch])
        moved = 1 - (features[batch_size:] * before[kept]).sum(dim=-1)
        return wrong + keep * moved.mean()

    yield from _optimize(list(model.vision_model.parameters()), loss, **stage)


def _unit_features(model: CLIPModel, images: Tensor) -> Tensor:
    return F.normalize(model.get_image_features(pixel_values(images)), dim=-1)


@torch.no_grad()
def zero_shot_head(
    model: CLIPModel, tokenizer: CLIPTokenizerFast, captions: Sequence[Sequence[str]]
) -> Tensor:
    """One unit vector per class: the mean of its captions' unit vectors, as FusionBench does it.

    Args:
        captions: per class, its captions.

    Returns:
        (classes, features).
    """
    rows = []
    for texts in captions:
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        rows.append(F.normalize(model.get_text_features(**tokens), dim=-1).mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


def _optimize(
    parameters: list[Tensor],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    warmup: float = 0.3,
) -> Iterator[int]:
    """AdamW on ``loss()``; yields after each step.

    A long warm-up, a cosine down to zero and clipped gradients: with less of either, the first
    hundred steps of so small a transformer are lost.
    """

    def pace(step: int) -> float:
        return min(1, (step + 1) / (warmup * steps)) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    for step in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield step


def make_expert(
    folder: Path, task: str, captions: Sequence[Sequence[str]], seed: int, stage: Mapping[str, Any]
) -> None:
    """Fine-tunes one expert of a pool under construction; prints a line per step for progress."""
    model = CLIPModel.from_pretrained(folder / "pretrained")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "pretrained")
    # The expert is saved as FusionBench loads it: a vision tower alone.
    expert = CLIPVisionModel.from_pretrained(folder / "pretrained")
    model.vision_model = expert.vision_model
    head = zero_shot_head(model, tokenizer, captions)
    images, labels = _train_split(folder, task)
    rest = sorted(path.stem for path in (folder / "data").glob("*.npz") if path.stem != task)
    others = torch.cat([_train_split(folder, name)[0][:OTHERS] for name in rest]) if rest else None
    own_seed = seed + zlib.crc32(task.encode())
    for _ in finetune(model, head, images, labels, seed=own_seed, others=others, **stage):
        sys.stdout.write(f"{task}\n")  # in one write: the workers share a pipe
        sys.stdout.flush()
    save_whole(expert, folder / "experts" / task)


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """Saves it under another name first: a folder of this name is never half of one."""
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    part.rename(folder)


def _train_split(folder: Path, task: str) -> tuple[Tensor, Tensor]:
    with np.load(folder / "data" / f"{task}.npz") as data:
        return torch.from_numpy(data["train_images"]), torch.from_numpy(data["train_labels"])


def main() -> None:
    """The worker: reads one job, ``{folder, seed, stage, tasks: {name: captions}}``, from stdin."""
    torch.set_num_threads(1)
    job = json.loads(sys.stdin.read())
    for task, captions in job["tasks"].items():
        make_expert(Path(job["folder"]), task, captions, job["seed"], job["stage"])


if __name__ == "__main__":
    main()
