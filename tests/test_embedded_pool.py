"""The embedded pools: what they draw, how they are unpacked and built, what FusionBench sees."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_pool
import mini_pretraining
import numpy as np
import pytest
import torch
import training
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from fusion_bench.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from recipes import Pictures, Recipe, Stage
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast, CLIPVisionModel

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.files import CACHE_VARIABLE
from fusion_bench_intervmerge.fusion.embedded import pool as embedded
from fusion_bench_intervmerge.tinyclip import MINI, POOLS, TINY, ensure_pool, material, pools, tasks
from fusion_bench_intervmerge.tinyclip.tasks import SPLITS, TASKS

CONFIG = Path(__file__).parents[1] / "config"
SMALL = Recipe(
    images={"train": 24, "validation": 12, "test": 12},
    width=32,
    blocks=2,
    text_blocks=1,
    features=16,
    pretraining=Stage(steps=2, batch_size=16, lr=1e-3),
    finetuning=Stage(2, 8, 1e-3, keep=1.0, keep_batch_size=4),
)
every_task = pytest.mark.parametrize(
    "task", [task for pool in POOLS.values() for task in pool.tasks.values()], ids=lambda t: t.name
)


# --- images and captions


@every_task
def test_an_image_depends_on_seed_task_split_and_index_alone(task):
    images, labels = task.images(0, "test", 9)
    assert np.array_equal(images[:4], task.images(0, "test", 4)[0])
    assert images.shape == (9, tasks.SIZE, tasks.SIZE, 3) and images.dtype == np.uint8
    assert not np.array_equal(images, task.images(1, "test", 9)[0])
    assert len(task.classnames) > labels.max()


@every_task
def test_no_image_is_in_two_splits_and_classes_are_balanced(task):
    seen = Counter()
    for split in SPLITS:
        images, labels = task.images(0, split, 40)
        seen.update(image.tobytes() for image in images)
        counts = np.bincount(labels, minlength=len(task.classnames))
        assert counts.max() - counts.min() <= 1
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "emoji"])
def test_no_source_image_serves_two_splits(name):
    if name == "emoji":
        by_split = {s: {e.name for e in material.emoji() if e.split == s} for s in SPLITS}
    else:
        scans = tasks.digit_scans() if name == "digits" else material.scans(name)
        by_split = {s: {scan.tobytes() for label in scans[s] for scan in label} for s in SPLITS}
    assert not by_split["train"] & by_split["test"]
    assert not by_split["validation"] & (by_split["train"] | by_split["test"])


@every_task
def test_fusion_bench_knows_class_names_and_captions(task):
    classnames, templates = get_classnames_and_templates(task.name)
    assert classnames == list(task.classnames)
    captions = [[template(classname) for template in templates] for classname in classnames]
    assert captions == task.all_captions()


def test_the_notices_ship_with_the_images():
    notice = (material.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    assert all(sheet.name in notice for sheet in material.FOLDER.glob("*.png"))
    assert (material.FOLDER / "LICENSE-Apache-2.0.txt").stat().st_size > 10_000


# --- what ships


def test_a_pool_is_unpacked_once_by_whoever_is_first(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with ThreadPoolExecutor(2) as askers:
        (folder, other) = askers.map(lambda _: ensure_pool(), range(2))
    assert folder == other and list(tmp_path.iterdir()) == [folder]
    monkeypatch.setattr(pools, "unpack", None)
    assert ensure_pool() == folder
    drawn = TINY.tasks["shapes"].images(0, "test", pools.IMAGES["test"])
    for _ in range(2):  # drawn, and read
        images, labels = pools.load_images(folder, "shapes", "test")
        assert np.array_equal(images, drawn[0]) and np.array_equal(labels, drawn[1])
    pretrained = CLIPVisionModel.from_pretrained(folder / "pretrained").state_dict()
    for name in TASKS:
        expert = CLIPVisionModel.from_pretrained(folder / "experts" / name).state_dict()
        assert expert.keys() == pretrained.keys()
        assert any(not torch.equal(expert[key], pretrained[key]) for key in expert)


def test_a_cache_that_cannot_be_written_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "file"))) as error:
        ensure_pool()
    assert CACHE_VARIABLE in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_file_that_ships_is_named(tmp_path, monkeypatch):
    shutil.copytree(pools.WEIGHTS / TINY.name, tmp_path / TINY.name)
    with (tmp_path / TINY.name / "weights.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(b"!!!!")
    monkeypatch.setattr(pools, "WEIGHTS", tmp_path)
    with pytest.raises(ConfigError, match=r"weights\.safetensors: damaged"):
        pools.unpack(TINY, tmp_path / "pool")


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_every_word_of_a_caption_is_one_token_and_the_end_token_has_the_highest_id(pool):
    files = (pools.WEIGHTS / pool.name / name for name in ("vocab.json", "merges.txt"))
    tokenizer = pools.make_processor(*files).tokenizer
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    for task in pool.tasks.values():
        for caption in (text for names in task.all_captions() for text in names):
            words = re.findall(r"[a-z]+|[0-9]", caption.lower())
            tokens = [t for t in tokenizer.tokenize(caption) if t[0].isalnum()]
            assert tokens == [f"{word}</w>" for word in words]
            assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length


# --- how pools are built, at the smallest size


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Workers of the build would import torch anew, each of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_pool, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, in_this_process) -> Path:
    folder = tmp_path_factory.mktemp("built") / "pool"
    build_pool.build(TINY, SMALL, 1, folder)
    return folder


def test_a_stopped_build_goes_on_where_it_was_to_the_same_bits(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "pool.building")
    experts = tmp_path / "pool.building" / "experts"
    (experts / "letters").rename(experts / "letters.part")
    monkeypatch.setattr(build_pool, "pretrain", None)
    monkeypatch.setattr(tasks.Task, "images", None)
    build_pool.build(TINY, SMALL, 1, tmp_path / "pool")
    made, before = (
        (root / "experts/letters/model.safetensors").read_bytes()
        for root in (tmp_path / "pool", folder)
    )
    assert made == before


def test_what_is_packed_is_what_is_unpacked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "WEIGHTS", tmp_path)
    build_pool.pack(TINY, folder, tmp_path / TINY.name)
    pools.unpack(TINY, tmp_path / "again")
    for part in ("pretrained", "experts/letters"):
        one, other = (
            CLIPVisionModel.from_pretrained(root / part).state_dict()
            for root in (folder, tmp_path / "again")
        )
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-3)


def test_minis_recipe_makes_the_tokenizer_that_ships(tmp_path):
    parts = mini_pretraining.collections(0, Pictures(16, 2, 16, 8, 60, 16))
    texts = [text for part in parts for names in part.captions for text in names]
    files = build_pool.write_tokenizer(tmp_path, texts)
    pools.make_processor(*files).save_pretrained(tmp_path)
    for file in files:
        assert file.read_bytes() == (pools.WEIGHTS / MINI.name / file.name).read_bytes()


def test_the_processor_agrees_with_the_pixels_of_training(folder):
    images = TASKS["shapes"].images(0, "train", 4)[0]
    processor = CLIPProcessor.from_pretrained(folder / "pretrained")
    pixels = processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    expected = training.pixel_values(torch.from_numpy(images))
    torch.testing.assert_close(pixels.pixel_values, expected, rtol=0, atol=1e-6)


def test_text_is_pooled_at_its_end_token(folder):
    clip = CLIPModel.from_pretrained(folder / "pretrained").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "pretrained")
    tokens = tokenizer(["the colour red", "a photo of two dots"], padding=True, return_tensors="pt")
    with torch.no_grad():
        text = clip.text_model(**tokens)
        alone = clip.text_model(**tokenizer("the colour red", return_tensors="pt"))
    end = tokens.input_ids.argmax(dim=1)
    assert torch.equal(text.pooler_output, text.last_hidden_state[torch.arange(2), end])
    torch.testing.assert_close(text.pooler_output[:1], alone.pooler_output)


# --- as FusionBench sees them


@pytest.fixture
def config(folder):
    """The shipped configs of model pool and task pool, over the pool that was built."""
    read = {g: OmegaConf.load(CONFIG / g / f"{TINY.name}.yaml") for g in ("modelpool", "taskpool")}
    config = OmegaConf.create(read)
    config.modelpool.folder = str(folder)
    return config


def test_the_model_pool_has_eight_experts_and_their_datasets(config, folder):
    config.modelpool.models = {"_merged_": str(folder / "experts" / "digits")}
    models = instantiate(config.modelpool)
    assert models.model_names == list(TASKS)
    assert models.has_pretrained and models.has_merged
    assert isinstance(models.load_model("gratings"), CLIPVisionModel)
    assert isinstance(models.load_clip_model("_pretrained_"), CLIPModel)
    for load, split in (
        (models.load_train_dataset, "train"),
        (models.load_val_dataset, "validation"),
        (models.load_test_dataset, "test"),
    ):
        dataset = load("digits")
        assert len(dataset) == SMALL.images[split]
        assert dataset[3]["image"].mode == "RGB" and dataset[3]["label"] == 3


def test_the_task_pool_evaluates_every_task_on_the_model_pools_folder(config):
    taskpool = instantiate(config.taskpool)
    report = taskpool.evaluate(instantiate(config.modelpool).load_model("digits"))
    assert len(taskpool.test_datasets["shapes"]) == SMALL.images["test"]
    assert report.keys() == {*TASKS, "model_info", "average"}
    assert all(0 <= report[name]["accuracy"] <= 1 for name in TASKS)


def test_the_processor_has_hugging_faces_bits(config, folder, tmp_path):
    processor = instantiate(config.modelpool).load_processor()
    theirs = CLIPProcessor.from_pretrained(folder / "pretrained")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    wide, small = Image.fromarray(noise), Image.fromarray(noise[:32, :32])
    for given in (
        {"images": [small]},
        {"images": [wide]},
        {"images": [small, wide]},
        {"images": [small.convert("L")]},
        {"text": ["a"]},
    ):
        result = processor(**given, return_tensors="pt")
        for name, value in theirs(**given, return_tensors="pt").items():
            assert torch.equal(result[name], value)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CLIPProcessor


@pytest.mark.parametrize("name", [*POOLS, *(f"open{name}" for name in POOLS)])
def test_configs_name_the_pool_and_its_tasks(name):
    pool = POOLS[name.removeprefix("open")]
    assert OmegaConf.load(CONFIG / "modelpool" / f"{name}.yaml").pool == pool.name
    config = OmegaConf.load(CONFIG / "taskpool" / f"{name}.yaml")
    for part in (config.test_datasets, config.get("classification_heads", config.test_datasets)):
        assert {task: one.task for task, one in part.items()} == {task: task for task in pool.tasks}
        assert {one.pool for one in part.values()} == {pool.name}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"seed": 1}, r"^modelpool.seed: 1 does not ship .*tools/build_pool.py clip-vit-tiny_TA8 "),
        ({"folder": "nowhere"}, r"^modelpool.folder: nowhere has no clip-vit-tiny_TA8; allowed: "),
        ({"pool": "clip-vit-huge"}, "^modelpool.pool.*clip-vit-tiny_TA8, clip-vit-mini_TA8$"),
        ({"tasks": ["digit"]}, "^modelpool.tasks.digit: .*did you mean digits"),
        ({"fodler": "x"}, "^modelpool.fodler: .*did you mean folder"),
    ],
)
def test_what_no_pool_is_ends_in_one_line(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        embedded.EmbeddedCLIPVisionModelPool(**settings)


def test_an_unknown_task_or_split_is_named():
    with pytest.raises(ConfigError, match="has no 'dogs'; allowed: digits, "):
        embedded.load_dataset("dogs", "test")
    with pytest.raises(ConfigError, match="has no 'val'; allowed: train, "):
        embedded.load_dataset("digits", "val")
