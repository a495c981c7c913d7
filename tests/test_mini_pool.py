"""The pool whose weights ship: its images, its recipe, and that the two belong together."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from omegaconf import OmegaConf
from test_embedded_pool import CONFIG
from transformers import CLIPModel, CLIPTokenizerFast, CLIPVisionModel

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.fusion.embedded import pool as pools
from fusion_bench_intervmerge.tinyclip import material, shipped, training
from fusion_bench_intervmerge.tinyclip.build import ensure_pool
from fusion_bench_intervmerge.tinyclip.mini import Pictures
from fusion_bench_intervmerge.tinyclip.pools import MINI, POOLS, Pool
from fusion_bench_intervmerge.tinyclip.processor import write_processor
from fusion_bench_intervmerge.tinyclip.tasks import SPLITS
from fusion_bench_intervmerge.tinyclip.tokenizer import write_tokenizer

FEW = replace(MINI, recipe=replace(MINI.recipe, pictures=Pictures(16, 2, 16, 8, 60, 16)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the first use unpacks, but for the images."""
    folder = tmp_path_factory.mktemp("mini")
    shipped.unpack(MINI, folder)
    return folder


# --- the images


def test_no_source_image_serves_two_splits():
    for name in ("mnist", "fashion_mnist"):
        of = {
            split: {scan.tobytes() for some in classes for scan in some}
            for split, classes in material.scans(name).items()
        }
        assert not of["train"] & of["test"] and not of["validation"] & (of["train"] | of["test"])
    names = {
        split: {one.name for one in material.emoji() if one.split == split} for split in SPLITS
    }
    assert not names["train"] & names["test"]
    assert not names["validation"] & (names["train"] | names["test"])


@pytest.mark.parametrize("task", MINI.tasks.values(), ids=MINI.tasks)
def test_images_depend_on_seed_task_split_and_index_alone(task):
    images, labels = task.images(0, "test", 9)
    assert np.array_equal(images[:4], task.images(0, "test", 4)[0])
    assert images.shape == (9, 32, 32, 3) and labels.max() < len(task.classnames)
    assert not np.array_equal(images, task.images(1, "test", 9)[0])
    assert not np.array_equal(images, task.images(0, "train", 9)[0])


@pytest.mark.parametrize("task", MINI.tasks.values(), ids=MINI.tasks)
def test_fusion_bench_knows_class_names_and_captions(task):
    classnames, templates = get_classnames_and_templates(task.name)
    assert classnames == list(task.classnames)
    for label, classname in enumerate(classnames):
        assert [template(classname) for template in templates] == task.captions(label)


def test_a_damaged_sheet_is_named(tmp_path, monkeypatch):
    for name in ("mnist.png", "digests.json"):
        shutil.copy(material.FOLDER / name, tmp_path / name)
    with (tmp_path / "mnist.png").open("ab") as file:
        file.write(b"!")
    monkeypatch.setattr(material, "FOLDER", tmp_path)
    material.scans.cache_clear()
    with pytest.raises(ConfigError, match=r"mnist\.png"):
        material.scans("mnist")


# --- recipe and weights


def test_the_weights_are_of_todays_recipe_and_of_seed_0():
    assert shipped.has(MINI) and not shipped.has(MINI.seeded(1)) and not shipped.has(FEW)


def test_the_recipe_makes_the_tokenizer_that_ships(folder, tmp_path):
    captions = [text for some in FEW.collections(FEW.recipe) for c in some.captions for text in c]
    write_processor(write_tokenizer(tmp_path, captions, MINI.recipe.context), tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (shipped.WEIGHTS / MINI.name / name).read_bytes()


def test_an_experts_first_steps_lead_where_the_expert_that_ships_is(folder):
    """The recipe's own steps from the pretrained encoder, as many as a test may take."""
    task, others = MINI.tasks["counting"], [MINI.tasks[name] for name in ("letters", "shapes")]
    model = CLIPModel.from_pretrained(folder / "pretrained")
    before = [value.detach().clone() for value in model.vision_model.parameters()]
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "pretrained")
    captions = [task.captions(label) for label in range(len(task.classnames))]
    images, labels = (torch.from_numpy(part) for part in task.images(0, "train", 400))
    stage = asdict(MINI.recipe.finetuning) | {"steps": 30}
    kept = torch.cat([torch.from_numpy(other.images(0, "train", 40)[0]) for other in others])
    head = training.zero_shot_head(model, tokenizer, captions)
    for _ in training.finetune(model, head, images, labels, seed=0, others=kept, **stage):
        pass
    vector = _difference(model.vision_model.parameters(), before)

    def alignment(name):
        expert = CLIPVisionModel.from_pretrained(folder / "experts" / name)
        return F.cosine_similarity(vector, _difference(expert.parameters(), before), dim=0)

    assert alignment("counting") > 3 * max(alignment(name) for name in ("letters", "textures"))


def _difference(after, before):
    pairs = zip(after, before, strict=True)
    return torch.cat([(a.detach() - b).flatten() for a, b in pairs])


def test_what_is_packed_is_what_is_unpacked(folder, tmp_path, monkeypatch):
    original = (shipped.WEIGHTS / MINI.name / "weights.safetensors").read_bytes()
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    packed = shipped.pack(MINI, folder)
    assert (packed / "weights.safetensors").stat().st_size == len(original)
    again = tmp_path / "again"
    shipped.unpack(MINI, again)
    one, other = (
        CLIPVisionModel.from_pretrained(at / "experts" / "mnist").state_dict()
        for at in (folder, again)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


def test_damaged_weights_are_named(tmp_path, monkeypatch):
    shutil.copytree(shipped.WEIGHTS / MINI.name, tmp_path / MINI.name)
    with (tmp_path / MINI.name / "weights.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(b"!!!!")
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    with pytest.raises(ConfigError, match=r"weights\.safetensors"):
        shipped.unpack(MINI, tmp_path / "pool")


def test_the_notices_ship_with_the_images():
    notice = (material.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    digests = json.loads((material.FOLDER / "digests.json").read_text(encoding="utf-8"))
    assert all(name in notice for name in digests)
    assert (material.FOLDER / "LICENSE-Apache-2.0.txt").stat().st_size > 10_000


# --- as a pool


def test_configs_name_the_pool_and_its_tasks():
    for name in (MINI.name, f"open{MINI.name}"):
        assert OmegaConf.load(CONFIG / "modelpool" / f"{name}.yaml").pool == MINI.name
        tasks = OmegaConf.load(CONFIG / "taskpool" / f"{name}.yaml").test_datasets
        assert list(tasks) == list(MINI.tasks)
        assert {(task, one.task, one.pool) for task, one in tasks.items()} == {
            (task, task, MINI.name) for task in MINI.tasks
        }


def test_the_model_pool_hands_its_name_to_its_datasets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pools, "ensure_pool", lambda seed, pool: asked.append(pool) or tmp_path)
    models = pools.EmbeddedCLIPVisionModelPool(pool=MINI.name, tasks=["mnist"])
    assert asked == [MINI.name] and models.model_names == ["mnist"]
    assert models._test_datasets["mnist"].pool == MINI.name


def test_an_unknown_pool_is_named():
    with pytest.raises(ConfigError, match="clip-vit-huge") as error:
        ensure_pool(pool="clip-vit-huge")
    assert all(name in str(error.value) for name in POOLS)
    with pytest.raises(ConfigError, match="clip-vit-huge"):
        Pool.named("clip-vit-huge")
