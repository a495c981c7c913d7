"""DINOv2 experts of image classification, repaired and evaluated in FusionBench's task pool."""

from __future__ import annotations

import copy

import torch
from conftest import dinov2_tower
from fusion_bench.models.wrappers.switch import SwitchModule
from fusion_bench.taskpool.image_classification import ImageClassificationTaskPool
from torch import nn
from torch.utils.data import TensorDataset

from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.merging import mix
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving.solve import solve

TASKS = ["mnist", "svhn"]  # FusionBench wants to know how many classes there are
READ = "class and patches"


class OnTask(nn.Module):
    """A task's classifier, as FusionBench switches between them."""

    def __init__(self, model, task, head):
        super().__init__()
        self.model, self.task, self.head = model, task, head

    def forward(self, images):
        return self.head(self.model.encode(images, self.task))


def test_repaired_experts_in_the_image_classification_task_pool():
    generator = torch.Generator().manual_seed(0)
    experts = {t: lambda s=s: dinov2_tower(s, 0.05, READ) for s, t in enumerate(TASKS, start=1)}
    heads, data = {}, {}
    for task in TASKS:
        heads[task] = nn.Linear(64, 10).requires_grad_(False)
        images = torch.randn(60, 3, 32, 32, generator=generator)
        with torch.no_grad():  # so that the expert is always right
            features = experts[task]().features(images)
            heads[task].weight.copy_(torch.randn(10, 64, generator=generator))
            heads[task].bias.copy_(-heads[task].weight @ features.mean(dim=0))
            data[task] = list(
                zip(images, heads[task](features).argmax(dim=1).tolist(), strict=True)
            )
    merged = dinov2_tower(pooling=READ)
    mix(merged, (experts[task]() for task in TASKS), torch.full((2,), 0.3))
    images = {t: TensorDataset(torch.stack([image for image, _ in data[t]])) for t in TASKS}

    def accuracy(model, of=lambda task: task):
        switch = SwitchModule({task: OnTask(model, of(task), heads[task]) for task in TASKS})
        pool = ImageClassificationTaskPool(
            data, processor=None, dataloader_kwargs={"batch_size": 20, "num_workers": 0}
        )
        return pool.evaluate(switch)["average"]["accuracy"]

    site = {"function": "nodireft", "rank": 8, "tokens": "all", "init": "regression"}
    model = InterventionModel(merged, TASKS, {"block": site})
    before = accuracy(model, of=lambda task: None)
    solve(model, experts, images)
    solved = accuracy(model)
    trained = copy.deepcopy(model)
    distill(trained, experts, images, steps=30, batch_size=16)
    assert before < solved and before + 0.1 < accuracy(trained), (before, solved, accuracy(trained))


def test_its_model_card_calls_it_by_its_name(tmp_path):
    InterventionModel(dinov2_tower(), ["a"], {"attention": {}}).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "A merged DINOv2 vision encoder" in card and "CLIP" not in card
    assert "pipeline_tag: image-feature-extraction" in card and "- dinov2" in card
