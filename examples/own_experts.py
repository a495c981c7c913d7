"""Your own experts and your own images: a pool of live models, no config files.

Draws two small data sets, fine-tunes a CLIP vision encoder on each, merges the two by averaging,
and repairs the merge with FusionBench's algorithm interface. In place of the drawn images and of
``fine_tune`` put your data set and your models.

    python examples/own_experts.py                     # starts from the embedded CLIP: no download
    python examples/own_experts.py --pretrained openai/clip-vit-base-patch32

With the embedded CLIP it takes about a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from fusion_bench.dataset.image_dataset import ImageClassificationDataset
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.utils.instantiate_utils import set_print_function_call_permeanent
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
from fusion_bench_intervmerge.tinyclip import ensure_pool


class Drawn(Dataset):
    """Any data set will do whose items are ``{"image": PIL image, "label": int}``."""

    classes = 4

    def __init__(self, task: str, count: int, seed: int):
        self.task, self.count, self.seed = task, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index >= self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        label = index % self.classes
        image = Image.new("RGB", (64, 64), tuple(rng.integers(0, 120, 3).tolist()))
        draw, ink = ImageDraw.Draw(image), tuple(rng.integers(130, 256, 3).tolist())
        if self.task == "bars":  # how many
            for bar in range(label + 1):
                x = 8 + 14 * bar + int(rng.integers(0, 5))
                draw.rectangle((x, 10, x + 5, 10 + int(rng.integers(20, 44))), ink)
        else:  # in which corner
            x, y = rng.integers(2, 12, 2) + np.array([label % 2, label // 2]) * 30
            draw.ellipse((x, y, x + 18, y + 18), ink)
        return {"image": image, "label": label}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", help="id or folder of a CLIP; default: the embedded one")
    parser.add_argument("--expert-steps", type=int, default=100, help="of fine-tuning an expert")
    parser.add_argument("--steps", type=int, default=100, help="of the repair, a task")
    parser.add_argument("--images", type=int, default=512, help="a data set")
    options = parser.parse_args()
    pretrained = options.pretrained or str(ensure_pool(pool="clip-vit-mini_TA8") / "pretrained")
    torch.manual_seed(0)
    set_print_function_call_permeanent(False)  # FusionBench would print all it instantiates

    processor = CLIPProcessor.from_pretrained(pretrained)
    projection = CLIPModel.from_pretrained(pretrained).visual_projection
    tasks = ("bars", "corners")
    train = {task: Drawn(task, options.images, seed=0) for task in tasks}
    test = {task: Drawn(task, options.images, seed=1) for task in tasks}
    experts, heads = {}, {}
    for task in tasks:
        expert = CLIPVisionModel.from_pretrained(pretrained)
        images = ImageClassificationDataset(train[task], processor)
        heads[task] = fine_tune(expert, projection, images, options.expert_steps)
        experts[task] = expert

    # Models may be live modules, ids or folders; they are copied, never merged into. Data sets are
    # what FusionBench instantiates: here this script's class, in YAML any importable one.
    sets = {
        task: {"_target_": f"{__name__}.Drawn", "task": task, "count": options.images, "seed": 1}
        for task in tasks
    }
    pool = CLIPVisionModelPool(
        {"_pretrained_": pretrained, **experts}, processor=pretrained, test_datasets=sets
    )
    average = {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}
    method = IntervMergeAlgorithm({"attention": {"rank": 4}}, base=average, steps=options.steps)
    model = method.run(pool)  # prints how far the features were and are from the experts'

    print("accuracy: expert, merged, repaired")
    for task in tasks:
        images = ImageClassificationDataset(test[task], processor)
        encoders = {
            "expert": lambda x, e=experts[task]: projection(e(x).pooler_output),
            "merged": lambda x: model.encode(x),
            "repaired": lambda x, t=task: model.encode(x, t),
        }
        right = [accuracy(heads[task], encode, images) for encode in encoders.values()]
        print(f"  {task:8}", *(f"{share:6.1%}" for share in right))


def fine_tune(expert: CLIPVisionModel, projection: nn.Linear, images: Dataset, steps: int):
    """Train an encoder with a linear head, in place; returns the head."""
    head = nn.Linear(projection.out_features, Drawn.classes)
    frozen = copy.deepcopy(projection).requires_grad_(False)
    optimizer = torch.optim.AdamW([*expert.parameters(), *head.parameters()], lr=3e-4)
    expert.train()
    batches = DataLoader(images, batch_size=32, shuffle=True)
    step = 0
    while step < steps:
        for pixels, labels in batches:
            loss = nn.functional.cross_entropy(head(frozen(expert(pixels).pooler_output)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
    expert.eval()
    return head


@torch.no_grad()
def accuracy(head: nn.Linear, encode, images: Dataset) -> float:
    right = [head(encode(x)).argmax(dim=-1) == labels for x, labels in DataLoader(images, 64)]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    main()
