"""Pushing and pulling, by the stock client, on a hub that is served on 127.0.0.1."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from conftest import TASKS, blocks, hf_tower, openclip_tower, perturbed
from fusion_bench.modelpool import CLIPVisionModelPool
from huggingface_hub import ModelCard, constants
from loopback_hub import OWNERS, address, serve
from omegaconf import OmegaConf
from PIL import Image
from test_clip import make_repaired
from test_command import in_process
from test_examples import commands
from test_experts import clip_pool, lora
from test_missing import told
from transformers import CLIPVisionModel

from fusion_bench_intervmerge.cli import main
from fusion_bench_intervmerge.config import ArtifactError, ConfigError
from fusion_bench_intervmerge.deploy.clip import image_processor
from fusion_bench_intervmerge.deploy.heads import known_heads
from fusion_bench_intervmerge.deploy.push import read_results
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.tinyclip import ensure_pool

UV = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


@pytest.fixture
def hub(request, tmp_path, monkeypatch):
    """A hub; its parameter is what it does with names of data sets that lack their owner."""
    with serve(tmp_path / "hub", getattr(request, "param", "redirect")) as hub:
        address(hub, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        yield hub


@pytest.fixture
def model():
    return perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {"rank": 2}}))


def test_what_is_pushed_is_what_is_pulled(hub, model, images, tmp_path):
    model.metadata["images"] = "ten drawings"
    address = model.push_to_hub("me/repaired")
    assert address.startswith(f"{hub.endpoint}/me/repaired/commit/")
    model.save_pretrained(tmp_path / "saved")
    saved = {p.relative_to(tmp_path / "saved").as_posix() for p in _files(tmp_path / "saved")}
    assert set(hub.files("me/repaired")) == saved
    again = InterventionModel.from_pretrained("me/repaired")
    assert again.metadata == model.metadata
    with torch.no_grad():
        for task in (None, *TASKS):
            assert torch.equal(again.encode(images, task), model.encode(images, task))
    assert 'from_pretrained("me/repaired")' in hub.files("me/repaired")["README.md"].decode()


def test_an_older_revision_and_a_second_push(hub, model, images):
    first = model.push_to_hub("me/repaired").rpartition("/")[2]
    model.drop_task("bees")
    model.push_to_hub("me/repaired", delete_patterns="interventions/*")
    assert InterventionModel.from_pretrained("me/repaired").tasks == ["ants", "cats"]
    assert InterventionModel.from_pretrained("me/repaired", revision=first).tasks == TASKS


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# -- what a pool names -------------------------------------------------------------------------


def digit_pool(**paths):
    """FusionBench's own pool; its data sets by the names that are given."""
    sets = {
        task: {"_target_": "datasets.load_dataset", "path": path, "split": "test"}
        for task, path in paths.items()
    }
    models = {"_pretrained_": hf_tower().model, **{task: hf_tower().model for task in paths}}
    processor = {"_target_": "transformers.CLIPProcessor.from_pretrained"}
    processor["pretrained_model_name_or_path"] = str(ensure_pool() / "pretrained")
    kwargs = {"test_datasets": OmegaConf.create(sets), "processor": OmegaConf.create(processor)}
    return ExpertPool(CLIPVisionModelPool(models, **kwargs))


@pytest.mark.parametrize("hub", ["redirect", "404", "strict"], indirect=True)
@pytest.mark.parametrize("name", OWNERS)
def test_data_sets_with_and_without_their_owner(name, hub, tmp_path):
    image = Image.effect_noise((28, 28), 60).convert("L")
    rows = {"image": [image] * 3, "label": [0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "test.parquet")
    owned = f"{OWNERS[name]}/{name}"
    content = (tmp_path / "test.parquet").read_bytes()
    hub.commit(owned, {"test.parquet": content, "README.md": b"# a data set"})
    ours = digit_pool(**{name: owned})
    assert ours.images(name, "test")[2][1] == 2
    stock = digit_pool(**{name: name})
    if hub.unowned == "redirect":
        assert torch.equal(stock.images(name, "test")[0][0], ours.images(name, "test")[0][0])
        return
    line = told(stock.images, name, "test")
    assert line.startswith(f"modelpool.test_datasets.{name}: could not be loaded (")
    assert f"the hub's {owned}, as in modelpool=clip-vit-b32_TA8 and our others" in line


def test_an_adapter_by_its_id(hub, tmp_path):
    tiny = ensure_pool()
    lora(CLIPVisionModel.from_pretrained(tiny / "pretrained")).save_pretrained(tmp_path / "lora")
    hub.commit("me/lora", {p.name: p.read_bytes() for p in _files(tmp_path / "lora")})
    pool = ExpertPool(clip_pool(tiny, far="me/lora", near=str(tmp_path / "lora")))
    pixels = torch.randn(2, 3, 32, 32)
    far, near, before = (pool.tower(n).features(pixels) for n in ("far", "near", "_pretrained_"))
    assert torch.equal(far, near) and not torch.allclose(far, before, atol=1e-2)


# -- the card ----------------------------------------------------------------------------------


def test_the_card_is_what_a_hub_indexes(model, tmp_path):
    model.metadata |= {
        "base_model": "openai/clip-vit-base-patch32",
        "images": "all of the test split",
        "transductive": True,
        "results": {"ants": 0.5, "bees": 0.75, "cats": 1.0},
    }
    model.save_pretrained(tmp_path / "repaired")
    card = ModelCard.load(tmp_path / "repaired" / "README.md")
    assert card.data.library_name == "fusion-bench-intervmerge"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert {"clip", "model-merging"} < set(card.data.tags)
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("ants", "accuracy", 0.5),
        ("bees", "accuracy", 0.75),
        ("cats", "accuracy", 1.0),
    ]
    text = " ".join(card.text.split())
    assert "Its edits were found on all of the test split." in text
    assert "test results are transductive" in text
    assert "| average | 75.0 |" in text


def test_a_card_says_nothing_that_is_not_known(model, tmp_path):
    model.metadata |= {
        "base_model": str(tmp_path),
        "images": "the train split",
        "transductive": False,
    }
    model.save_pretrained(tmp_path / "repaired")
    text = (tmp_path / "repaired" / "README.md").read_text()
    assert str(tmp_path) not in text  # a folder of this machine is no base model
    assert "base_model" not in text and "model-index" not in text and "average" not in text
    assert "its test results are held-out" in " ".join(text.lower().split())


# -- what goes wrong ---------------------------------------------------------------------------


def test_no_model_of_that_name(hub):
    with pytest.raises(ArtifactError, match="me/nothing: there is no such folder, and it is not"):
        InterventionModel.from_pretrained("me/nothing")


def test_no_hub(model, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ArtifactError, match=r"\Ame/repaired: .*\Z"):
        InterventionModel.from_pretrained("me/repaired")
    with pytest.raises(ArtifactError, match=r"\Ame/repaired: not pushed .*\Z"):
        model.push_to_hub("me/repaired", token="t")


def test_no_token(hub, model):
    with pytest.raises(ArtifactError, match=r"me/repaired: not pushed .*401"):
        model.push_to_hub("me/repaired", token=False)
    assert not (hub.folder / "me").exists()


def test_half_a_model(hub, model):
    model.push_to_hub("me/repaired")
    files = hub.files("me/repaired")
    del files["interventions/bees.safetensors"]
    hub.commit("me/repaired", files)
    with pytest.raises(ArtifactError, match=r"bees\.safetensors"):
        InterventionModel.from_pretrained("me/repaired")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{nowhere}", "me/x"], "no artifact here"),
        (["{saved}", "no name"], "repo: 'no name' cannot name a repository; allowed: owner/model"),
        (["{saved}", "me/x", "--run", "{nowhere}"], "there is no program_report.json"),
        (["{saved}", "me/x", "--run", "{saved}"], "its program_report.json lacks 'ants'"),
        (["{saved}", "me/x", "--no-onnx"], "clip: the model does not say which CLIP"),
    ],
)
def test_bad_input_gets_one_line(words, said, hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "program_report.json").write_text('{"average": {"accuracy": 1}}')
    paths = {name: tmp_path / name for name in ("saved", "nowhere")}
    assert main(["push", *(word.format(**paths) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert not any("POST" in line for line in hub.asked)


def test_a_report_that_is_none(tmp_path):
    for text in ("[", "[]", '{"ants": 1}', '{"ants": {"accuracy": "high"}}'):
        (tmp_path / "program_report.json").write_text(text)
        with pytest.raises(ConfigError, match="holds no accuracies"):
            read_results(tmp_path, ["ants"])


def test_openclip_models_are_pushed_as_well(hub, tmp_path, capsys):
    model = InterventionModel(openclip_tower(), TASKS, {"attention": {}})
    model.save_pretrained(tmp_path / "saved")
    assert main(["push", str(tmp_path / "saved"), "me/other", "--no-onnx"]) == 0
    assert capsys.readouterr().out.startswith(f"me/other: {hub.endpoint}/me/other/commit/")
    processor = huggingface_hub.hf_hub_download("me/other", "preprocessor_config.json")
    assert '"image_std"' in Path(processor).read_text()
    assert InterventionModel.from_pretrained("me/other").tower.family == "openclip"


# -- three commands: train, push, and classify where nothing else is installed -------------------


def test_train_push_and_classify_elsewhere(hub, tmp_path, capfd):
    """examples/push_and_classify.sh: two commands in this process, the third in a fresh venv."""
    if UV is None:
        pytest.skip("needs uv for a fresh environment")
    from fusion_bench_intervmerge.tinyclip.pools import MINI

    drawn, _ = MINI.tasks["shapes"].images(0, "test", 6)
    files = [str(tmp_path / f"{index}.png") for index in range(len(drawn))]
    for file, image in zip(files, drawn, strict=True):
        Image.fromarray(image).save(file)
    words = ["me/repaired", "shapes", *files]
    (tmp_path / "calls").mkdir()
    train, push, classify = commands("push_and_classify.sh", words, tmp_path / "calls")
    assert [train[0], push[0], classify[0]] == ["fusion_bench", "intervmerge", "uv"]
    (run,) = (Path(w.partition("=")[2]) for w in train if w.startswith("path.log_dir="))
    in_process(*train[1:], "fast_dev_run=true", folder=run.parent)
    assert main(push[1:]) == 0

    card = ModelCard(hub.files("me/repaired")["README.md"].decode())
    assert len(card.data.eval_results) == 8 and "transductive" in card.text

    capfd.readouterr()
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([UV, *classify[1:]], env=alone, capture_output=True, text=True)
    if "No solution found" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ") for line in done.stdout.splitlines())

    model = InterventionModel.from_pretrained("me/repaired")
    heads, names = known_heads(model, ["shapes"])
    pictures = [Image.open(file) for file in files]
    pixels = image_processor(model)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.encode(pixels, "shapes"), dim=-1)
    shares = (features @ heads["shapes"].T).softmax(dim=-1)
    for file, share in zip(files, shares, strict=True):
        name, score = said[file].rsplit(" ", 1)
        assert name == names["shapes"][int(share.argmax())]
        assert abs(float(score) - float(share.max())) < 2e-3


def test_the_page_shows_the_examples_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "200")
    recorded = commands("push_and_classify.sh", ["OWNER/MODEL", "digits", "image.png"], tmp_path)
    run = next(w.partition("=")[2] for w in recorded[0] if w.startswith("path.log_dir="))
    text = blocks("deployment.md#Hub")[-1].replace("\\\n", " ").replace("outputs/first", run)
    shown = [shlex.split(line) for line in text.splitlines()]
    assert [sorted(Path(w).name for w in words) for words in shown] == [
        sorted(Path(w).name for w in words) for words in recorded
    ]


def test_the_page_uses_the_stock_pipeline(tmp_path, monkeypatch, capsys):
    make_repaired().save_pretrained(tmp_path / "outputs" / "first" / "intervmerge")
    Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("deployment.md#Stock pipelines", "python")
    exec(block, {})
    assert "'label': 'circle'" in capsys.readouterr().out
