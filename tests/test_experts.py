"""What people bring as experts: adapters, classifiers, and checkpoints that are not sound."""

from __future__ import annotations

import logging
import shutil
import types
import typing
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
import typing_extensions
from conftest import dinov2_tower, hf_tower
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.models.linearized.vision_model import linearize_lora_model_
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from test_missing import Pool, told
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
)

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.files import CACHE_VARIABLE
from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
from fusion_bench_intervmerge.fusion.comparison import ComparisonAlgorithm
from fusion_bench_intervmerge.fusion.merge import merge_experts
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.merging import CoefficientSettings, mix
from fusion_bench_intervmerge.tinyclip import ensure_pool

LOADS = "fusion_bench.models.linearized.vision_model.load_"
HOST = types.SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny():
    """The folders of the embedded pool: ``pretrained``, ``experts/TASK``."""
    return ensure_pool("clip-vit-tiny_TA8")


def clip_pool(tiny, **models):
    models = {"_pretrained_": str(tiny / "pretrained"), **models}
    processor = {"_target_": "transformers.CLIPProcessor.from_pretrained"}
    processor["pretrained_model_name_or_path"] = str(tiny / "pretrained")
    models = OmegaConf.create(models, flags={"allow_objects": True})  # live modules
    return CLIPVisionModelPool(models, processor=OmegaConf.create(processor))


def lora(part, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, **options
    )
    return peft.get_peft_model(part, config)


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Folders of the same adapter, as it is saved with either of transformers' two classes."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("inner", "outer"):
        model = CLIPVisionModel.from_pretrained(tiny / "pretrained")
        lora(model.vision_model if name == "inner" else model).save_pretrained(folder / name)
    return folder


def test_adapters_are_experts_however_they_come(tiny, adapters):
    def hosted(kind, **options):
        base = {"base_model_name": str(tiny / "pretrained"), "peft_name": str(adapters / "inner")}
        return {"_target_": f"{LOADS}lora_vision_model_hf", **base, **options}

    models = {
        "_pretrained_": {
            "_target_": f"{LOADS}fft_vision_model_hf",
            "model_name": str(tiny / "pretrained"),
        },
        "merged": hosted("lora", merge_and_unload=True),
        "around_the_inner": hosted("lora"),
        "inside_the_outer": hosted("lora", return_vision_model=False),
        "folder_of_the_inner": str(adapters / "inner"),
        "folder_of_the_outer": str(adapters / "outer"),
    }
    pool = ExpertPool(clip_pool(tiny, **models))
    images = torch.randn(2, 3, 32, 32)
    before = pool.tower("_pretrained_").features(images)
    towers = [pool.tower(task) for task in pool.tasks]
    wanted = towers[0].features(images)
    assert not torch.allclose(wanted, before, atol=1e-2)
    for tower in towers:
        assert list(tower.mergeable()) == list(towers[0].mergeable())
        torch.testing.assert_close(tower.features(images), wanted)
    merged, _ = merge_experts(pool, SimpleAverageAlgorithm(), None, HOST)
    torch.testing.assert_close(merged.features(images), wanted)
    assert pool.about()["base_model"] == str(tiny / "pretrained")
    assert pool.about()["preprocessor"]["crop_size"] == {"height": 32, "width": 32}


def test_a_live_adapter_is_merged_into_a_copy():
    tower = hf_tower()
    model = lora(tower.model)
    names = [name for name, _ in model.named_parameters()]
    wanted = list(hf_tower().mergeable())
    assert list(as_tower(model, tower.projection).mergeable()) == wanted
    assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["post_layernorm"]}])
def test_an_adapter_that_transformers_put_in(options):
    tower = hf_tower()
    tower.model.add_adapter(lora(hf_tower().model, **options).peft_config["default"])
    images = torch.randn(2, 3, 32, 32)
    wanted = tower.projection(tower.model.eval()(images).pooler_output)
    merged = as_tower(tower.model, tower.projection)
    assert list(merged.mergeable()) == list(hf_tower().mergeable())
    torch.testing.assert_close(merged.features(images), wanted)
    assert not torch.allclose(wanted, hf_tower().features(images), atol=1e-3)
    tower.model.disable_adapters()
    off = as_tower(tower.model, tower.projection).features(images)
    torch.testing.assert_close(off, hf_tower().features(images))


def test_a_linearised_adapter_is_refused():
    tower = hf_tower()
    model = linearize_lora_model_(lora(tower.model))
    with pytest.raises(TypeError, match="its PEFT adapter cannot be merged"):
        as_tower(model, tower.projection)


def test_an_adapter_of_something_else(tiny, tmp_path):
    lora(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)})).save_pretrained(
        tmp_path
    )
    line = told(ExpertPool(clip_pool(tiny, digits=str(tmp_path))).tower, "digits")
    assert line.startswith("modelpool.models.digits: ") and "does not fit _pretrained_" in line


def test_without_peft(tiny, adapters, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    line = told(ExpertPool(clip_pool(tiny, digits=str(adapters / "inner"))).tower, "digits")
    assert line.endswith("inner is a PEFT adapter; allowed: pip install peft")


# -- checkpoints that are not sound ----------------------------------------------------------------


def nan_expert():
    model = hf_tower().model
    with torch.no_grad():
        model.vision_model.post_layernorm.bias[3] = torch.nan
    return model


NAN = "modelpool.models.bees: vision_model.post_layernorm.bias has numbers that are not finite"


@pytest.mark.parametrize(
    "way",
    [
        lambda pool: merge_experts(pool, TaskArithmeticAlgorithm(0.3), None, HOST),
        lambda pool: merge_experts(pool, None, CoefficientSettings(), HOST),
        lambda pool: ComparisonAlgorithm(
            bases={"average": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}},
            methods={},
        )._merge(pool, "average"),
        lambda pool: IntervMergeAlgorithm({"attention": {}}).repair(pool, hf_tower()),
        lambda pool: IntervMergeAlgorithm(
            {"attention": {"function": "nodireft", "init": "regression"}}, steps=0
        ).repair(pool, hf_tower()),
    ],
    ids=["base", "coefficients", "comparison", "trained", "solved"],
)
def test_an_expert_that_is_not_finite_is_named(way):
    models = {"_pretrained_": hf_tower().model, "ants": hf_tower().model, "bees": nan_expert()}
    items = {task: [{"image": Image.new("RGB", (32, 32))}] * 4 for task in ("ants", "bees")}
    pool = ExpertPool(Pool(models, test_datasets=items))
    pool._projection = hf_tower().projection
    assert told(way, pool) == f"{NAN}; allowed: finite weights"


def test_coefficients_in_python_take_no_such_expert_either():
    bad = as_tower(nan_expert(), hf_tower().projection)
    with pytest.raises(ConfigError, match="not finite"):
        mix(hf_tower(), [bad], torch.tensor([0.3]))


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module."])
def test_a_checkpoint_whose_names_have_a_prefix(tiny, tmp_path, prefix):
    model = CLIPVisionModel.from_pretrained(tiny / "experts" / "digits")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    nested = {"_target_": f"{LOADS}fft_vision_model_hf", "model_name": str(tmp_path)}
    line = told(ExpertPool(clip_pool(tiny, digits=nested)).tower, "digits")
    assert f"its names begin with {prefix}" in line
    line = told(ExpertPool(clip_pool(tiny, digits=str(tmp_path))).tower, "digits")
    assert "lacks vision_model.embeddings.class_embedding and" in line
    assert f"its names begin with {prefix}; allowed: the names without {prefix}" in line


def test_a_pretrained_model_without_its_projection(tiny, tmp_path):
    folder = shutil.copytree(tiny / "pretrained", tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    models = {"_pretrained_": str(folder), "digits": str(tiny / "experts" / "digits")}
    line = told(ExpertPool(clip_pool(tiny, **models)).tower, "digits")
    assert line.startswith(f"modelpool.models._pretrained_: {folder} lacks visual_projection.wei")
    assert line.endswith("allowed: the id or the folder of a whole CLIP")


def test_files_and_twins(tiny, tmp_path, caplog):
    expert = str(tiny / "experts" / "digits")
    line = told(ExpertPool(clip_pool(tiny, digits="weights/digits.pt")).tower, "digits")
    assert line.startswith("modelpool.models.digits: weights/digits.pt is a file; allowed: a fold")
    with caplog.at_level(logging.WARNING, logger="fusion_bench_intervmerge"):
        ExpertPool(clip_pool(tiny, digits=expert, shapes=expert))
    assert caplog.messages == [f"one expert for two tasks, digits and shapes: {expert}"]


def test_a_pool_without_images_says_where_they_are(tiny):
    line = told(ExpertPool(clip_pool(tiny, mnist="x")).images, "mnist", "test")
    assert "the pool has no test images for this task; allowed: a pool with images, such as" in line
    assert "+dataset/image_classification/test@modelpool.test_datasets=[mnist,...]" in line


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_a_folder_is_not_read_in_place_of_a_data_set(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    config = OmegaConf.create({name: {"_target_": "datasets.load_dataset", "_args_": [name]}})
    pool = CLIPVisionModelPool(OmegaConf.create({name: "x"}), test_datasets=config)
    line = told(ExpertPool(pool).images, name, "test")
    assert f"the folder {name} here would be read in place of the data set; allowed: the" in line


# -- DINOv2 ----------------------------------------------------------------------------------------


def test_dinov2_classifiers_of_unequal_classes(tmp_path, monkeypatch):
    with patch.object(typing, "override", typing_extensions.override, create=True):
        from fusion_bench.modelpool import Dinov2ForImageClassificationPool

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    models, processor = {}, BitImageProcessor(**crop)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for index, (task, classes) in enumerate({"_pretrained_": 2, "ants": 3, "bees": 5}.items()):
        torch.manual_seed(index)
        config = Dinov2Config(**sizes, image_size=64, patch_size=8, num_labels=classes)
        Dinov2ForImageClassification(config).save_pretrained(tmp_path / task)
        processor.save_pretrained(tmp_path / task)
        models[task] = {"config_path": str(tmp_path / task)}
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    items = [{"image": Image.fromarray(image)} for image in noise]

    class InMemory(Dinov2ForImageClassificationPool):
        def load_test_dataset(self, name):
            return items

    host = InMemory(OmegaConf.create(models), test_datasets={"ants": {}, "bees": {}})
    pool = ExpertPool(host)
    pixels = pool.images("bees", "test")[0][0][None]
    site = {"block": {"function": "nodireft", "rank": 4, "init": "regression"}}
    for base in (SimpleAverageAlgorithm(), TaskArithmeticAlgorithm(0.3)):
        method = IntervMergeAlgorithm(site, base, steps=0, save_to=str(tmp_path / "saved"))
        model = method.run(host)
        assert model.tower.image_size == 32, "as the processor makes them"
        assert pool.head("bees")(model.encode(pixels, "bees")).shape == (1, 5)
        assert pool.head("ants")(model.encode(pixels, "ants")).shape == (1, 3)


def test_dinov2_says_how_to_take_smaller_images():
    with pytest.raises(ValueError, match=r"images of 16 pixels, not 32: .*image_size=16"):
        dinov2_tower().features(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("live", [False, True])
def test_an_expert_in_half_precision(tiny, tmp_path, dtype, live):
    """Rounded weights are an expert like any other, and the merge is in full precision."""
    expert = CLIPVisionModel.from_pretrained(tiny / "experts" / "digits").to(dtype)
    expert.save_pretrained(tmp_path / "half")
    half = expert if live else str(tmp_path / "half")
    pool = ExpertPool(clip_pool(tiny, digits=half, letters=str(tiny / "experts" / "letters")))
    base = TaskArithmeticAlgorithm(scaling_factor=0.3)
    merged, _ = merge_experts(pool, base, None, HOST, None)
    rounded = expert.float().state_dict()
    letters = CLIPVisionModel.from_pretrained(tiny / "experts" / "letters").state_dict()
    first = CLIPVisionModel.from_pretrained(tiny / "pretrained").state_dict()
    for name, tensor in merged.library_model().state_dict().items():
        if tensor.is_floating_point():
            moved = rounded[name] + letters[name] - 2 * first[name]
            by_hand = first[name] + 0.3 * moved
            assert tensor.dtype == torch.float32 and torch.allclose(tensor, by_hand, atol=1e-6)
