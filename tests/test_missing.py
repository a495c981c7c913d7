"""What a pool lacks, or what does not fit it, is one line that names the config key."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import hf_tower
from fusion_bench import BaseModelPool
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
from fusion_bench_intervmerge.fusion.comparison import ComparisonAlgorithm
from fusion_bench_intervmerge.fusion.host import check_task_pool
from fusion_bench_intervmerge.fusion.openclip import OpenCLIPVisionModelTaskPool
from fusion_bench_intervmerge.fusion.pools import ExpertPool

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
PICTURE = Image.new("RGB", (32, 32))


class Pool(BaseModelPool):
    """Models and data sets in memory; an exception among them is raised when it is loaded."""

    def load_model(self, name, *args, **kwargs):
        return _given(self._models[name])

    def load_test_dataset(self, name, *args, **kwargs):
        return _given(self._test_datasets[name])

    def load_processor(self):
        return lambda image: torch.zeros(3, 32, 32)


class Broken(list):
    def __getitem__(self, index):
        raise OSError("image file is truncated")


def _given(thing):
    if isinstance(thing, Exception):
        raise thing
    return thing


def pool_of(items, **models):
    models = models or {"_pretrained_": hf_tower().model, "bees": hf_tower().model}
    pool = ExpertPool(Pool(models, test_datasets={"bees": items}))
    pool._projection = hf_tower().projection
    return pool


def told(call, *args):
    with pytest.raises(ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("label", [{"label": 3}, {}], ids=["labelled", "not labelled"])
def test_items_need_no_label(label):
    images = pool_of([{"image": PICTURE, **label}]).images("bees", "test")
    pixels, found = images[0]
    assert pixels.shape == (3, 32, 32) and found == label.get("label", -1)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"img": 1, "fine_label": 2}], "bees: items hold img, fine_label, and no image; allowed"),
        ([5], "bees: items hold int, and no image; allowed: items with `image`"),
        (Broken([1]), "bees[0]: could not be loaded (image file is truncated)"),
        (
            ValueError('Unknown split "tset".\nIt has: test'),
            "bees: could not be loaded (Unknown sp",
        ),
        (ConnectionError("refused"), "bees: could not be loaded (refused); allowed: a reachable"),
    ],
)
def test_images_that_cannot_be_read(items, message):
    line = told(pool_of(items).images, "bees", "test")
    assert line.startswith(f"modelpool.test_datasets.{message}")


def test_an_expert_that_only_the_base_loads():
    experts = {"bees": hf_tower().model, "ants": OSError("401 Client Error: gated repo")}
    pool = pool_of([], _pretrained_=hf_tower().model, **experts)
    pool.pool._models["ants"] = experts["ants"]
    line = told(IntervMergeAlgorithm({"attention": {}}, SimpleAverageAlgorithm()).merge, pool)
    assert line.startswith("modelpool.models.ants: could not be loaded (401 Client Error: gated")
    assert "modelpool=clip-vit-mini_TA8" in line


class GivesNone:
    def run(self, pool):
        return {}


def test_a_base_that_gives_no_model_is_named_as_the_comparison_names_it():
    bases = {"none": {"_target_": f"{__name__}.GivesNone"}}
    comparison = ComparisonAlgorithm(bases=bases, methods={})
    line = told(comparison._merge, pool_of([]), "none")
    assert line.startswith("bases.none: it gives a dict; allowed: a method that gives one")


@pytest.mark.parametrize("settings", [{"coefficients": {}}, {"base": TaskArithmeticAlgorithm(0.3)}])
def test_an_expert_of_another_shape(settings):
    other = CLIPVisionModel(CLIPVisionConfig(**SMALL | {"intermediate_size": 48}))
    pool = pool_of([], _pretrained_=hf_tower().model, bees=other)
    line = told(IntervMergeAlgorithm({"attention": {}}, **settings).merge, pool)
    assert line.startswith("modelpool.models.bees: ") and "has shape (48" in line


def test_vision_models_of_no_known_family_are_refused_by_name():
    model = SiglipVisionModel(SiglipVisionConfig(**SMALL))
    with pytest.raises(TypeError, match=f"no vision tower is known for .*{type(model).__name__}"):
        as_tower(model, torch.nn.Linear(32, 16, bias=False))
    line = told(pool_of([], bees=model).tower, "bees")
    assert line.startswith("modelpool.models.bees: no vision tower is known for transformers.")


@pytest.mark.parametrize("family", ["huggingface", "openclip"])
def test_a_task_pool_of_the_other_family(family):
    class Program:
        taskpool = object.__new__(OpenCLIPVisionModelTaskPool)

    if family == "openclip":
        Program.taskpool = object.__new__(CLIPVisionModelTaskPool)
    else:
        Program.taskpool._classifier_heads = {}
    line = told(check_task_pool, Program(), family, [])
    assert line.startswith("taskpool: it evaluates ") and "the same name" in line
    other = {"openclip": "huggingface", "huggingface": "openclip"}[family]
    check_task_pool(Program(), other, [])


def test_tasks_without_an_expert_are_named_beforehand(caplog):
    class Program:
        taskpool = object.__new__(CLIPVisionModelTaskPool)

    Program.taskpool._test_datasets = {"bees": [], "ants": [], "cats": []}
    with caplog.at_level(logging.WARNING, logger="fusion_bench_intervmerge"):
        check_task_pool(Program(), "huggingface", ["ants"])
    assert caplog.messages == [
        "no expert knows bees, cats: evaluated with the merged encoder, and marked as unseen"
    ]


def test_a_data_set_without_its_owner_says_so():
    class Hub(Pool):
        def load_test_dataset(self, name, *args, **kwargs):
            raise ValueError("Repository id must be 'namespace/name'")

    svhn = {"_target_": "datasets.load_dataset", "_args_": ["svhn", "cropped_digits"]}
    models = {"_pretrained_": hf_tower().model, "svhn": hf_tower().model}
    pool = ExpertPool(Hub(models, test_datasets={"svhn": svhn}))
    line = told(pool.images, "svhn", "test")
    assert line.startswith("modelpool.test_datasets.svhn: could not be loaded (Repository id must")
    assert "the hub's ufldl-stanford/svhn, as in modelpool=clip-vit-b32_TA8" in line
