"""Saved models: whole or not at all, and nothing is believed that does not fit."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TASKS, hf_tower, perturbed, relative
from safetensors.torch import load_file, save_file
from test_attacks import put, small_model
from test_model import EVERYWHERE, SETTINGS
from transformers import CLIPVisionModelWithProjection

from fusion_bench_intervmerge.config import ArtifactError, ConfigError
from fusion_bench_intervmerge.files import write_json
from fusion_bench_intervmerge.model import artifact
from fusion_bench_intervmerge.model.model import InterventionModel


@pytest.mark.parametrize("sites", SETTINGS)
def test_what_was_saved_is_what_is_loaded(make_tower, images, sites, tmp_path):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites, seed=5))
    model.metadata = {"coefficients": {"coefficients": torch.rand(3)}, "images": "few"}
    model.save_pretrained(tmp_path / "model")
    again = InterventionModel.from_pretrained(tmp_path / "model")
    assert again.interventions == model.interventions and again.tasks == TASKS
    assert again.seed == 5 and again.metadata["images"] == "few"
    assert torch.equal(
        again.metadata["coefficients"]["coefficients"],
        model.metadata["coefficients"]["coefficients"],
    )
    with torch.no_grad():
        for task in (None, *TASKS):
            assert torch.equal(again.encode(images, task), model.encode(images, task))
        again.fold().save_pretrained(tmp_path / "folded")
        folded = InterventionModel.from_pretrained(tmp_path / "folded")
        assert relative(folded.encode(images, "cats"), model.encode(images, "cats")) < 1e-6


def test_the_folder_is_plain_files(tmp_path):
    InterventionModel(hf_tower(), TASKS, {"attention": {}}).save_pretrained(tmp_path / "m")
    files = {str(p.relative_to(tmp_path / "m")) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "merged/config.json",
        "merged/model.safetensors",
        *(f"interventions/{task}.safetensors" for task in TASKS),
    }
    assert "3 tasks" in (tmp_path / "m" / "README.md").read_text()
    edits = load_file(tmp_path / "m" / "interventions" / "ants.safetensors")
    assert set(edits) == {f"attention.{b}.{t}" for b in range(3) for t in ("W1", "W2", "b")}


EVERY_R = {
    "attention": {"function": "loreft", "rank": 3},
    "mlp": {"function": "lobireft", "tokens": "patch", "share_tokens": False},
    "block": {"function": "direft", "rank": 2, "blocks": [1]},
    "output": {"function": "consreft", "rank": 4},
}


def trained(model):
    """The model with an X of the orthonormal R that is far from R."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.edits.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_tensors_in_a_file_are_the_formulas(tmp_path, images):
    model = trained(InterventionModel(hf_tower(), TASKS, EVERY_R))
    model.save_pretrained(tmp_path / "m")
    edits = load_file(tmp_path / "m" / "interventions" / "ants.safetensors")
    assert {name.rpartition(".")[2] for name in edits} == {"R", "W1", "b"}
    function = model.edits_of("ants")["attention 1"]
    assert torch.equal(edits["attention.1.R"], function.R)
    original = function.parametrizations.R.original
    assert (edits["attention.1.R"] - original).abs().max() > 0.1
    R = edits["attention.1.R"]
    torch.testing.assert_close(R @ R.mT, torch.eye(3), rtol=0, atol=1e-5)


def test_saved_and_loaded_again_and_again_no_bit_changes(tmp_path, images):
    model = trained(InterventionModel(hf_tower(), TASKS, EVERY_R))
    model.save_pretrained(tmp_path / "once")
    loaded = InterventionModel.from_pretrained(tmp_path / "once")
    copy.deepcopy(loaded).save_pretrained(tmp_path / "twice")
    InterventionModel.from_pretrained(tmp_path / "twice").fold().save_pretrained(tmp_path / "f")
    folded = InterventionModel.from_pretrained(tmp_path / "f")
    for task in TASKS:
        first, second = (
            (tmp_path / which / "interventions" / f"{task}.safetensors").read_bytes()
            for which in ("once", "twice")
        )
        assert first == second
        with torch.no_grad():
            expected = model.encode(images, task)
            assert torch.equal(loaded.encode(images, task), expected)
            assert torch.equal(folded.encode(images, task), model.fold().encode(images, task))


def test_a_loaded_model_trains_as_the_saved_one(tmp_path, images):
    model = trained(InterventionModel(hf_tower(), ["ants"], EVERY_R))
    model.save_pretrained(tmp_path / "m")
    loaded = InterventionModel.from_pretrained(tmp_path / "m")
    fresh = InterventionModel(hf_tower(), ["ants"], EVERY_R)  # X is the same R, but not loaded
    with torch.no_grad():
        for name, parameter in loaded.edits.named_parameters():
            fresh.edits.get_parameter(name).copy_(parameter)
    gradients = []
    for each in (loaded, fresh):
        each.encode(images, "ants").abs().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.edits.parameters()]))
    assert relative(*gradients) < 1e-5
    with torch.no_grad():
        for parameter in loaded.edits.parameters():
            parameter -= 0.1 * parameter.grad
    R = loaded.edits_of("ants")["attention 0"].R
    torch.testing.assert_close(R @ R.mT, torch.eye(3), rtol=0, atol=1e-5)


def test_transformers_itself_reads_the_merged_encoder(images, tmp_path):
    InterventionModel(hf_tower(), TASKS, {"attention": {}}).save_pretrained(tmp_path / "m")
    stock = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "m" / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(images).image_embeds, hf_tower().features(images))


@pytest.fixture
def folder(tmp_path):
    InterventionModel(hf_tower(), TASKS, {"attention": {}}).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(folder, **entries):
    """Change config.json and its digest with it, as who wants to be believed would."""
    config = json.loads((folder / "config.json").read_text()) | entries
    del config["digest"]
    config["digest"] = artifact._digest_of_config(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_other_merged_weights(folder):
    path = folder / "merged" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, path)
    with pytest.raises(ArtifactError, match="not the weights that the edits were trained on"):
        InterventionModel.from_pretrained(folder)


def test_torn_and_missing_files(folder):
    path = folder / "interventions" / "bees.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="torn"):
        InterventionModel.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"bees\.safetensors: missing"):
        InterventionModel.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        InterventionModel.from_pretrained(folder)
    with pytest.raises(ArtifactError, match="no artifact here"):
        InterventionModel.from_pretrained(folder / "nowhere")


def test_edits_of_another_shape(folder):
    change(folder, interventions={"attention": {"rank": 2}})
    with pytest.raises(ArtifactError, match=r"ants\.safetensors has misshapen"):
        InterventionModel.from_pretrained(folder)


# -- nothing is believed that is not what was saved ------------------------------------------------


def edit_by_hand(folder, *path_and_value):
    """Change an entry of config.json and leave its digest."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    put(*path_and_value)(config)
    path.write_text(json.dumps(config, indent=2))


@pytest.mark.parametrize(
    "change",
    [
        ("tower", "vision_config", "layer_norm_eps", 1e-4),
        ("interventions", "attention", "tokens", "last"),
        ("tasks", TASKS[::-1]),
    ],
    ids=lambda change: change[-2],
)
def test_a_setting_that_was_changed_later(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))  # laid out anew
    InterventionModel.from_pretrained(folder)
    edit_by_hand(folder, *change)
    with pytest.raises(ArtifactError, match=r"config\.json: changed since it was saved"):
        InterventionModel.from_pretrained(folder)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_modes_are_the_umasks(umask, tmp_path):
    before = os.umask(umask)
    try:
        small_model().save_pretrained(tmp_path / "m")
        write_json(tmp_path / "file.json", {})
    finally:
        os.umask(before)
    for path in [*tmp_path.rglob("*")]:
        mode = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == mode & ~umask, path


def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    model = InterventionModel(hf_tower(1, 0.1), TASKS, {"attention": {"rank": 2}})
    monkeypatch.setattr(
        "fusion_bench_intervmerge.model.artifact._save",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )  # a test has no disk that fills up
    with pytest.raises(ConfigError, match="No space left on device"):
        model.save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_no_write_permission():
    # Not even root may write there; a read-only folder would not stop root.
    with pytest.raises(ConfigError, match="cannot be written"):
        InterventionModel(hf_tower(), TASKS, {"attention": {}}).save_pretrained("/proc/self/m")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be written to"):
        small_model().save_pretrained(tmp_path / "file" / "m")
    with pytest.raises(ConfigError, match="file is not a directory; allowed"):
        small_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").is_file()


# -- nothing is lost but a saved model -------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.txt", "notes/day.md", "config.json", ".env"])
def test_a_folder_of_other_things_is_left_alone(name, tmp_path):
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    first = file.relative_to(tmp_path / "folder").parts[0]
    with pytest.raises(ConfigError, match=f"folder holds {first}, which would be lost"):
        small_model().save_pretrained(tmp_path / "folder")
    assert file.read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_was_put_into_a_saved_model_is_not_lost(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"m holds notes\.txt, which would be lost"):
        small_model().save_pretrained(folder)
    (folder / "notes.txt").unlink()
    (folder / "README.md").write_text("a card of my own")
    small_model().save_pretrained(folder)
    assert InterventionModel.from_pretrained(folder).tasks == small_model().tasks


def test_what_may_be_replaced(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for place in (tmp_path / "absent", tmp_path / "empty", folder, tmp_path / "link"):
        small_model().save_pretrained(place)
        assert InterventionModel.from_pretrained(place).tasks == small_model().tasks
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_edits_in_fewer_bits_are_saved_as_they_are_evaluated(make_tower, images, storage, tmp_path):
    model = perturbed(InterventionModel(make_tower(), TASKS, EVERYWHERE))
    whole = model.extra_parameters()["bytes"]
    with torch.no_grad():
        before = model.encode(images, "ants")
        model.store_as(storage)
        features = model.encode(images, "ants")
        model.save_pretrained(tmp_path / "model")
        again = InterventionModel.from_pretrained(tmp_path / "model")
        assert torch.equal(again.encode(images, "ants"), features)
        assert not torch.equal(features, before)
        torch.testing.assert_close(again.fold().encode(images, "ants"), features)
    bytes_ = again.extra_parameters()["bytes"]
    assert again.storage == storage and bytes_ < 0.65 * whole
    again.save_pretrained(tmp_path / "twice")
    for task in TASKS:
        files = [
            tmp_path / name / "interventions" / f"{task}.safetensors" for name in ("model", "twice")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert files[0].stat().st_size < 0.65 * whole / 3 + 12000  # the header has the names
