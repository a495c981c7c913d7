"""The embedded pool: what it draws, how it is built, and what FusionBench makes of it."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from fusion_bench.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast, CLIPVisionModel

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.files import CACHE_VARIABLE, cache_root
from fusion_bench_intervmerge.fusion.embedded import pool
from fusion_bench_intervmerge.tinyclip import build, tasks, training
from fusion_bench_intervmerge.tinyclip.build import ensure_pool
from fusion_bench_intervmerge.tinyclip.pools import TINY
from fusion_bench_intervmerge.tinyclip.recipe import Recipe, Stage
from fusion_bench_intervmerge.tinyclip.tasks import SPLITS, TASKS

CONFIG = Path(__file__).parents[1] / "config"
RECIPE = Recipe(
    train=24,
    validation=12,
    test=12,
    width=32,
    blocks=2,
    text_blocks=1,
    features=16,
    pretraining=Stage(steps=2, batch_size=16, lr=1e-3),
    finetuning=Stage(steps=2, batch_size=8, lr=1e-3),
)
SMALL = replace(TINY, recipe=RECIPE)


# --- images and captions


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_an_image_depends_on_seed_task_split_and_index_alone(task):
    images, labels = task.images(0, "test", 9)
    fewer, fewer_labels = task.images(0, "test", 4)
    assert np.array_equal(images[:4], fewer) and np.array_equal(labels[:4], fewer_labels)
    assert images.shape == (9, tasks.SIZE, tasks.SIZE, 3) and images.dtype == np.uint8
    assert not np.array_equal(images, task.images(1, "test", 9)[0])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_image_is_in_two_splits_and_classes_are_balanced(task):
    seen = Counter()
    for split in SPLITS:
        images, labels = task.images(0, split, 60)
        seen.update(image.tobytes() for image in images)
        counts = np.bincount(labels, minlength=len(task.classnames))
        assert counts.max() - counts.min() <= 1
    assert set(seen.values()) == {1}


def test_no_handwritten_scan_serves_two_splits():
    scans = {
        split: {scan.tobytes() for of_digit in digits for scan in of_digit}
        for split, digits in tasks.digit_scans().items()
    }
    assert not scans["train"] & scans["test"]
    assert not scans["validation"] & (scans["train"] | scans["test"])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_fusion_bench_knows_class_names_and_captions(task):
    classnames, templates = get_classnames_and_templates(task.name)
    assert classnames == list(task.classnames)
    for label, classname in enumerate(classnames):
        assert [template(classname) for template in templates] == task.captions(label)


# --- the recipe and the cache


def test_the_digest_tells_seeds_sizes_stages_and_captions_apart(monkeypatch):
    def of(**changes):
        return replace(SMALL, recipe=replace(RECIPE, **changes)).digest()

    longer = replace(RECIPE.finetuning, steps=3)
    digests = [SMALL.digest(), of(seed=1), of(width=64), of(finetuning=longer)]
    monkeypatch.setitem(TASKS, "shapes", replace(TASKS["shapes"], prompts=("a {}",)))
    assert len({*digests, SMALL.digest()}) == 5


def test_the_tiny_pool_is_the_one_of_before_there_were_others():
    assert TINY.digest() == "cb72b4a51d87"


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv(CACHE_VARIABLE, "/chosen")
    assert cache_root() == Path("/chosen")
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_root() == Path("/xdg/fusion-bench-intervmerge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache/fusion-bench-intervmerge"


def test_a_cache_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "file"))) as error:
        ensure_pool(root=tmp_path / "file")
    assert CACHE_VARIABLE in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def fake_build(monkeypatch):
    """Stands in for the real build; counts how often it was asked for."""
    folders = []

    def fake(pool, folder, train):
        folders.append(folder)
        folder.mkdir(exist_ok=True)
        time.sleep(0.2)
        (folder / "recipe.json").write_text(pool.to_json())

    monkeypatch.setattr(build, "_build", fake)
    return folders


def test_a_folder_without_a_recipe_is_no_pool(tmp_path, fake_build):
    whole = tmp_path / f"{TINY.name}-{SMALL.digest()}"
    (whole / "pretrained").mkdir(parents=True)
    assert ensure_pool(root=tmp_path, pool=SMALL) == whole
    assert len(fake_build) == 1
    assert [path.name for path in whole.iterdir()] == ["recipe.json"]


def test_a_build_that_fails_leaves_no_pool(tmp_path, monkeypatch):
    def fail(pool, folder, train):
        (folder / "pretrained.part").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_pool(root=tmp_path, pool=SMALL)
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert left == [f".{TINY.name}-{SMALL.digest()}.building"]  # what the next one takes up


def test_of_two_who_ask_at_once_one_builds(tmp_path, fake_build):
    found = []
    askers = [
        threading.Thread(target=lambda: found.append(ensure_pool(root=tmp_path, pool=SMALL)))
        for _ in range(2)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(fake_build) == 1 and len(set(found)) == 1 and len(found) == 2


def test_a_worker_that_dies_says_why(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text("raise MemoryError('no room')")
    monkeypatch.setattr(training, "__file__", str(script))
    with (
        pytest.raises(RuntimeError, match="MemoryError: no room"),
        build._Workers(2) as workers,
    ):
        list(workers.finetune(SMALL, list(TASKS), tmp_path))


# --- a whole pool, of the smallest size


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ensure_pool(root=tmp_path_factory.mktemp("cache"), pool=SMALL)


def test_a_killed_build_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    """The same to the bit, though neither images nor encoder nor most experts are made again."""
    unfinished = tmp_path / f".{folder.name}.building"
    shutil.copytree(folder, unfinished)
    for name in ("recipe.json", "digests.json"):
        (unfinished / name).unlink()
    (unfinished / "experts" / "letters").rename(unfinished / "experts" / "letters.part")
    monkeypatch.setattr(training, "pretrain", None)
    monkeypatch.setattr(tasks.Task, "images", None)
    made = []
    finetune = build._Workers.finetune
    monkeypatch.setattr(
        build._Workers,
        "finetune",
        lambda self, pool, names, at: made.extend(names) or finetune(self, pool, names, at),
    )
    again = ensure_pool(root=tmp_path, pool=SMALL)
    assert made == ["letters"]
    assert (again / "digests.json").read_text() == (folder / "digests.json").read_text()


def test_a_built_pool_is_found_again(folder, monkeypatch):
    monkeypatch.setattr(build, "_build", None)
    assert ensure_pool(root=folder.parent, pool=SMALL) == folder
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]


@pytest.mark.parametrize(
    "name", ["data/letters.npz", "experts/letters/model.safetensors", "pretrained/config.json"]
)
@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_pool_is_built_again(folder, name, damage, tmp_path, fake_build, caplog):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    assert ensure_pool(root=tmp_path, pool=SMALL) == copy and not fake_build
    build._found_sound.discard(copy)  # as another process would look
    content = bytearray((copy / name).read_bytes())
    if damage == "gone":
        (copy / name).unlink()
    else:
        content[len(content) // 2] ^= 8
        cut = len(content) // 2 if damage == "torn" else None
        (copy / name).write_bytes(content[:cut])
    assert ensure_pool(root=tmp_path, pool=SMALL) == copy
    assert len(fake_build) == 1 and name in caplog.text


def test_experts_differ_from_the_pretrained_in_the_vision_tower(folder):
    pretrained = CLIPVisionModel.from_pretrained(folder / "pretrained").state_dict()
    for name in TASKS:
        expert = CLIPVisionModel.from_pretrained(folder / "experts" / name).state_dict()
        assert expert.keys() == pretrained.keys()
        assert any(not torch.equal(expert[key], pretrained[key]) for key in expert)


def test_an_expert_is_the_same_from_any_worker(folder, tmp_path):
    for part in ("data", "pretrained"):
        shutil.copytree(folder / part, tmp_path / part)
    captions, stage = build._captions(TINY, "letters"), asdict(RECIPE.finetuning)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training.make_expert(tmp_path, "letters", captions, RECIPE.seed, stage)
    torch.set_num_threads(threads)
    made, built = (
        CLIPVisionModel.from_pretrained(root / "experts" / "letters").state_dict()
        for root in (tmp_path, folder)
    )
    assert all(torch.equal(made[key], built[key]) for key in built)


def test_the_processor_agrees_with_the_pixels_of_training(folder):
    images, _ = TASKS["shapes"].images(0, "train", 4)
    processor = CLIPProcessor.from_pretrained(folder / "pretrained")
    pixels = processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    expected = training.pixel_values(torch.from_numpy(images))
    torch.testing.assert_close(pixels.pixel_values, expected, rtol=0, atol=1e-6)


def test_every_word_of_a_caption_is_one_token(folder):
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "pretrained")
    for name in TASKS:
        for caption in itertools.chain(*build._captions(TINY, name)):
            words = re.findall(r"[a-z]+|[0-9]", caption.lower())
            tokens = tokenizer(caption).input_ids
            assert tokenizer.convert_ids_to_tokens(tokens[1:-1]) == [
                word + "</w>" for word in words
            ]
            assert len(tokens) <= tokenizer.model_max_length == RECIPE.context


def test_text_is_pooled_at_its_end_token_which_has_the_highest_id(folder):
    clip = CLIPModel.from_pretrained(folder / "pretrained").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "pretrained")
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == clip.config.text_config.eos_token_id
    tokens = tokenizer(["the colour red", "a photo of two dots"], padding=True, return_tensors="pt")
    with torch.no_grad():
        text = clip.text_model(**tokens)
        alone = clip.text_model(**tokenizer("the colour red", return_tensors="pt"))
    end = tokens.input_ids.argmax(dim=1)
    assert torch.equal(text.pooler_output, text.last_hidden_state[torch.arange(2), end])
    torch.testing.assert_close(text.pooler_output[:1], alone.pooler_output)


# --- as FusionBench sees it


@pytest.fixture
def configs(folder, monkeypatch):
    """The shipped configs of model pool and task pool, over the smallest pool."""
    seeds = []
    monkeypatch.setattr(pool, "ensure_pool", lambda seed=0, pool="": seeds.append(seed) or folder)
    groups = ("modelpool", "taskpool")
    read = {group: OmegaConf.load(CONFIG / group / f"{TINY.name}.yaml") for group in groups}
    return OmegaConf.create(read), seeds


def test_the_model_pool_has_eight_experts_and_their_datasets(configs):
    models = instantiate(configs[0].modelpool)
    assert models.model_names == list(TASKS)
    assert models.has_pretrained and not models.has_merged
    assert isinstance(models.load_model("_pretrained_"), CLIPVisionModel)
    assert isinstance(models.load_model("gratings"), CLIPVisionModel)
    assert isinstance(models.load_clip_model("_pretrained_"), CLIPModel)
    assert isinstance(models.load_processor(), CLIPProcessor)
    for load, size in (
        (models.load_train_dataset, RECIPE.train),
        (models.load_val_dataset, RECIPE.validation),
        (models.load_test_dataset, RECIPE.test),
    ):
        dataset = load("digits")
        assert len(dataset) == size
        assert dataset[3]["image"].mode == "RGB" and dataset[3]["label"] == 3


def test_the_processor_makes_an_images_pixels_once_and_they_are_hugging_faces(
    configs, monkeypatch, tmp_path
):
    models = instantiate(configs[0].modelpool)
    processor, calls = models.load_processor(), []
    theirs = CLIPProcessor.from_pretrained(processor.tokenizer.name_or_path)
    assert models.load_processor() is processor
    process = CLIPProcessor.__call__
    monkeypatch.setattr(
        CLIPProcessor, "__call__", lambda *a, **k: calls.append(k) or process(*a, **k)
    )
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    for image in (models.load_test_dataset("shapes")[0]["image"], wide):
        expected = process(theirs, images=[image], return_tensors="pt")["pixel_values"]
        calls.clear()
        for _ in range(3):
            found = processor(images=[image], return_tensors="pt")["pixel_values"]
            assert torch.equal(found, expected)
            found.zero_()  # what a caller does to its tensor, no other sees
        assert len(calls) == 1
    # what is not remembered: several images, other modes, other wishes, captions
    for given in ({"images": [wide, wide]}, {"images": [wide.convert("L")]}, {"text": ["a"]}):
        found = processor(**given, return_tensors="pt")
        for name, value in process(theirs, **given, return_tensors="pt").items():
            assert torch.equal(found[name], value)
    assert isinstance(processor(images=[wide], return_tensors="np")["pixel_values"], np.ndarray)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CLIPProcessor


def test_a_merged_model_may_be_added(configs, folder):
    models = pool.EmbeddedCLIPVisionModelPool(
        models={"_merged_": str(folder / "experts" / "digits")}
    )
    assert models.has_merged and models.model_names == list(TASKS)


def test_the_stock_task_pool_evaluates_every_task_with_the_seed_of_the_model_pool(configs):
    config, seeds = configs
    config.modelpool.seed = 7
    report = instantiate(config.taskpool).evaluate(
        instantiate(config.modelpool).load_model("digits")
    )
    assert report.keys() == {*TASKS, "model_info", "average"}
    assert all(0 <= report[name]["accuracy"] <= 1 for name in TASKS)
    assert set(seeds) == {7}


def test_an_unknown_task_or_split_is_named():
    with pytest.raises(ConfigError, match="has no 'dogs'; allowed: digits, "):
        pool.load_dataset("dogs", "test")
    with pytest.raises(ConfigError, match="has no 'val'; allowed: train, "):
        pool.load_dataset("digits", "val")
