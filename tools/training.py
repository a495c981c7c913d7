"""Pre-training and fine-tuning of an embedded pool's encoders.

Every expert is trained by one thread with a random generator of its own, so that the result does
not depend on how many processes share the tasks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from recipes import Collection, Stage
from torch import Tensor
from tqdm.auto import trange
from transformers import CLIPModel, CLIPTokenizerFast, CLIPVisionModel, PreTrainedModel

from fusion_bench_intervmerge.deploy.heads import zero_shot_head
from fusion_bench_intervmerge.tinyclip.pools import MEAN, STD, Pool, load_images

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
    collections: Sequence[Collection],
    stage: Stage,
    seed: int,
) -> None:
    """Contrastive pre-training of both towers on the images of all collections, mixed.

    A class has several captions, all of them true. For each step every collection settles on one,
    so that no image is pushed away from a true one; images that share a caption share its
    positives.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = [
        [tokenizer(texts, padding="max_length", return_tensors="pt") for texts in task]
        for task in (part.captions for part in collections)
    ]
    pool = torch.cat([torch.from_numpy(part.images) for part in collections])
    labels = [torch.from_numpy(part.labels) for part in collections]
    task_of = torch.cat([torch.full((len(y),), t) for t, y in enumerate(labels)])
    label_of = torch.cat(labels)

    def loss() -> Tensor:
        batch = torch.randint(len(pool), (stage.batch_size,), generator=generator)
        pick = torch.randint(1 << 16, (len(collections),), generator=generator).tolist()
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

    _optimize(list(model.parameters()), loss, stage)


def finetune(
    model: CLIPModel,
    head: Tensor,
    images: Tensor,
    labels: Tensor,
    others: Tensor,
    stage: Stage,
    seed: int,
) -> None:
    """Train the vision tower, and nothing else, to classify with a frozen zero-shot head.

    Args:
        head: (classes, features), rows of unit length; see :func:`zero_shot_head`.
        images, labels: uint8 (n, size, size, 3) and int64 (n,).
        others: uint8 (m, size, size, 3), images whose features are to stay what they are now.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    scale = model.logit_scale.exp()
    if stage.keep:
        with torch.no_grad():
            before = torch.cat([_unit_features(model, some) for some in others.split(256)])

    def loss() -> Tensor:
        batch = torch.randint(len(images), (stage.batch_size,), generator=generator)
        if not stage.keep:
            features = _unit_features(model, images[batch])
            return F.cross_entropy(scale * features @ head.T, labels[batch])
        kept = torch.randint(len(others), (stage.keep_batch_size,), generator=generator)
        features = _unit_features(model, torch.cat([images[batch], others[kept]]))
        wrong = F.cross_entropy(scale * features[: stage.batch_size] @ head.T, labels[batch])
        moved = 1 - (features[stage.batch_size :] * before[kept]).sum(dim=-1)
        return wrong + stage.keep * moved.mean()

    _optimize(list(model.vision_model.parameters()), loss, stage)


def _unit_features(model: CLIPModel, images: Tensor) -> Tensor:
    return F.normalize(model.get_image_features(pixel_values(images)), dim=-1)


def _optimize(parameters: list[Tensor], loss: Callable[[], Tensor], stage: Stage) -> None:
    """AdamW on ``loss()``.

    A long warm-up, a cosine down to zero and clipped gradients: with less of either, the first
    hundred steps of so small a transformer are lost.
    """

    def pace(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / stage.steps)) / 2
        return min(1, (step + 1) / (stage.warmup * stage.steps)) * cosine

    optimizer = torch.optim.AdamW(
        parameters, lr=stage.lr, weight_decay=stage.weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    for _ in trange(stage.steps, mininterval=1, disable=None):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def make_expert(folder: Path, pool: str, task: str, stage: Stage, seed: int) -> str:
    """Fine-tune and save one expert of a pool under construction; returns the task."""
    torch.set_num_threads(1)
    tasks = Pool.named(pool).tasks
    model = CLIPModel.from_pretrained(folder / "pretrained")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "pretrained")
    # The expert is saved as FusionBench loads it: a vision tower alone.
    expert = CLIPVisionModel.from_pretrained(folder / "pretrained")
    model.vision_model = expert.vision_model
    head = zero_shot_head(model, tokenizer, tasks[task].all_captions())
    images, labels = map(torch.from_numpy, load_images(folder, task, "train"))
    rest = (
        load_images(folder, name, "train")[0][:OTHERS] for name in sorted(tasks) if name != task
    )
    others = torch.cat(list(map(torch.from_numpy, rest)))
    finetune(model, head, images, labels, others, stage, seed + zlib.crc32(task.encode()))
    save_whole(expert, folder / "experts" / task)
    return task


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """Save it under another name first: a folder of this name is never half of one."""
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    part.rename(folder)
