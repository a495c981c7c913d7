"""Saved models: whole or not at all, and nothing is believed that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TASKS, hf_tower, perturbed
from safetensors.torch import load_file, save_file
from test_model import SETTINGS
from transformers import CLIPVisionModelWithProjection

from fusion_bench_intervmerge import InterventionModel
from fusion_bench_intervmerge.artifact import ArtifactError
from fusion_bench_intervmerge.errors import ConfigError


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
        assert torch.equal(folded.encode(images, "cats"), model.encode(images, "cats"))


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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def test_another_format(folder):
    change(folder, format=99)
    with pytest.raises(ArtifactError, match="format 99; this version reads format 1"):
        InterventionModel.from_pretrained(folder)


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


def test_settings_that_do_not_fit_the_tower(folder):
    change(folder, interventions={"attention": {"blocks": [7]}})
    with pytest.raises(ArtifactError, match="there is no block 7"):
        InterventionModel.from_pretrained(folder)


def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    model = InterventionModel(hf_tower(1, 0.1), TASKS, {"attention": {"rank": 2}})
    monkeypatch.setattr(
        "fusion_bench_intervmerge.artifact.model_card",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )  # a disk that fills up cannot be had in a test
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
    with pytest.raises(ConfigError, match="cannot be written"):
        InterventionModel(hf_tower(), TASKS, {"attention": {}}).save_pretrained(
            tmp_path / "file" / "m"
        )
