"""``method=calibration``, ``method=featcal`` and repairs on top of them, on the embedded pool."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from commands import in_process, only, read_json
from conftest import TASKS, dinov2_tower, fine_tuned, hf_tower, openclip_tower
from transformers import CLIPVisionModel

from fusion_bench_intervmerge import CalibrationSettings
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.fusion import (
    CalibrationAlgorithm,
    FeatCalAlgorithm,
    IntervMergeAlgorithm,
)
from fusion_bench_intervmerge.fusion.calibrate import ALONE, images_of, nested_in
from fusion_bench_intervmerge.fusion.featcal import LinearFit, featcal, layers
from fusion_bench_intervmerge.fusion.records import summary
from fusion_bench_intervmerge.report.figures.accuracy import by_task
from fusion_bench_intervmerge.report.runs import gather, read_run
from fusion_bench_intervmerge.report.style import Palette

TWO = ["digits", "positions"]
TASK_ARITHMETIC = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.3}
NOTHING = dict.fromkeys(("split", "fraction", "images", "num_workers", "cache_gb"))
EIGHT = "method.data.images=8"


def config_of(method, **data):
    """The method's config as the command composes it."""
    target = f"fusion_bench_intervmerge.fusion.{method.__name__}"
    return {"_target_": target, "base": TASK_ARITHMETIC, "data": NOTHING | data, "seed": None}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The model of ``method=calibration``, FusionBench's report, and the run's folder."""
    folder = tmp_path_factory.mktemp("run")
    done = in_process("method=calibration", EIGHT, *only(*TWO), folder=folder)
    return done["merged_model"], done["report"], folder / "log"


def test_the_command_gives_the_pools_own_model_and_says_what_it_saw(calibrated):
    model, report, folder = calibrated
    assert type(model) is CLIPVisionModel and report["average"]["accuracy"] > 0.3
    ((_, result),) = read_json(folder / "intervmerge.json")["models"].items()
    assert (result["base"], result["method"]) == ("task_arithmetic", "calibration")
    assert result["images"] == [{"split": "train", "at_most": 8, "solved": True, "seed": 0}]
    assert result["extra_parameters"] == 0 and not result["needs_task"]
    assert list(read_json(folder / "reference_report.json")) == ["pretrained", "task_arithmetic"]


def test_it_is_saved_and_loaded_by_the_library(calibrated, tmp_path):
    model, _, _ = calibrated
    model.save_pretrained(tmp_path)
    loaded = CLIPVisionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_edits_go_on_top_of_it_with_the_same_images(tmp_path, monkeypatch, capfd):
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    more = [EIGHT, "method.data.split=train", "method.seed=1", "method.budget=258"]
    in_process("method=intervmerge/calibrated", *more, *only(*TWO), folder=tmp_path)
    models = read_json(tmp_path / "log" / "intervmerge.json")["models"]
    (result,) = models.values()
    one = {"split": "train", "at_most": 8, "solved": True, "seed": 1}
    assert result["images"] == [one, one] and result["base"] == "calibration"
    assert result["extra_parameters"] == 258 and result["settings"]["recalibrate"]
    assert "recalibrating" in result["seconds_by_part"]
    references = read_json(tmp_path / "log" / "reference_report.json")
    assert list(references) == ["pretrained", "task_arithmetic", "calibration"]
    (show,) = (call for call in at_exit if call[0] is summary)  # one table, of all of them
    merge = "Merge: 2 experts (digits, positions) by task_arithmetic, then calibration\n"
    assert merge in capfd.readouterr().out
    show[0](*show[1:])
    shown = capfd.readouterr().out
    for name in ("Pretrained", "Task Arithmetic", "Calibration", "To keep the model"):
        assert name in shown
    evaluation = gather([read_run(tmp_path / "log")])
    (picture,) = by_task(evaluation, Palette(evaluation.methods))
    assert len(picture.figure.axes) == 1, "the merge below the calibrated one has no repair"


def test_a_merged_model_of_the_pool_is_calibrated_too(calibrated, tmp_path):
    merged = tmp_path / "merged"
    calibrated[0].save_pretrained(merged)
    more = ["method.data.split=train", f"+modelpool.models._merged_={merged}", *only(*TWO)]
    in_process("method=intervmerge/calibrated", EIGHT, *more, folder=tmp_path)
    references = read_json(tmp_path / "log" / "reference_report.json")
    assert list(references) == ["pretrained", "merged", "calibration"]
    assert references["merged"]["average"] != references["calibration"]["average"]


def test_what_is_solved_together_needs_a_calibrated_base_and_edits_of_blocks():
    block = {"block": {"function": "nodireft", "init": "regression"}}
    attention = {"attention": {"function": "noreft", "init": "regression"}}
    trained = {"block": {"function": "nodireft"}}
    calibration, featcal = (config_of(cls) for cls in (CalibrationAlgorithm, FeatCalAlgorithm))
    for edits, base, line in (
        (block, TASK_ARITHMETIC, "the base does not calibrate; allowed: false, or method@method.b"),
        (block, featcal, "the base does not calibrate"),
        (block | attention, calibration, "edits at attention cannot be solved together"),
        (trained, calibration, "its edits are not in closed form; allowed: false, or init: reg"),
    ):
        with pytest.raises(ConfigError, match=f"^recalibrate: {line}"):
            IntervMergeAlgorithm(edits, base, recalibrate=True)
    assert IntervMergeAlgorithm(block, calibration, recalibrate=True).settings.recalibrate


def test_what_is_null_in_a_nested_base_is_the_repairs():
    edits = {"block": {"function": "nodireft", "init": "regression"}}
    inner = config_of(FeatCalAlgorithm) | {"seed": 5}
    outer = config_of(CalibrationAlgorithm, images=7) | {"base": inner}
    data = {"images": 9, "split": "validation", "fraction": 0.5}
    method = IntervMergeAlgorithm(edits, outer, data=data, seed=3, steps=0)
    used = images_of(method.settings.base)
    assert [(u.split, u.at_most, u.fraction, u.seed) for u in used] == [
        ("validation", 7, 0.5, 5),  # the inner base is nested in the calibration
        ("validation", 7, 0.5, 3),
    ]
    base = {k: v for k, v in config_of(CalibrationAlgorithm).items() if k != "_target_"}
    (alone,) = CalibrationAlgorithm(**base).images_used()
    assert (alone.split, alone.at_most, alone.seed) == (ALONE["split"], ALONE["images"], 0)
    assert nested_in(TASK_ARITHMETIC, CalibrationSettings()) is TASK_ARITHMETIC


def test_bad_settings_are_said_in_one_line():
    for method, settings, line in (
        (CalibrationAlgorithm, {"ridge": -1}, r"^ridge: -1; allowed: null, or a positive number"),
        (CalibrationAlgorithm, {"data": {"imges": 3}}, r"^data\.imges: no such setting"),
        (CalibrationAlgorithm, {"data": 3}, r"^data: 3; allowed"),
        (CalibrationAlgorithm, {"base": {"scaling_factor": 0.3}}, "^base: names no method"),
        (CalibrationAlgorithm, {"references": "no"}, "^references: 'no'; allowed: true, false"),
        (FeatCalAlgorithm, {"mixture": 2}, "^mixture: 2; allowed: a number, 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=line):
            method(**{"base": TASK_ARITHMETIC, **settings})


# -- FeatCal ---------------------------------------------------------------------------------------


def merge(make, experts):
    """Task Arithmetic."""
    tower, pretrained = make(), make()
    with torch.no_grad():
        for name, parameter in tower.mergeable().items():
            vectors = [expert().mergeable()[name] - parameter for expert in experts.values()]
            parameter += 0.3 * sum(vectors)
    return tower, pretrained


def test_a_linear_map_is_featcals_formula():
    generator = torch.Generator().manual_seed(0)
    tower = hf_tower()
    layer = layers(tower, 0)["mlp.fc1"]
    fit = LinearFit(layer, torch.device("cpu"))
    gram, right = torch.zeros(32, 32).double(), torch.zeros(32, 64).double()
    fabric = L.Fabric(devices=1, accelerator="cpu")
    for seed in (1, 2):
        x, mixed = torch.randn(2, 6, 17, 32, generator=generator).double()
        weights = torch.rand(17, generator=generator).double()
        theirs = layers(hf_tower(seed, noise=0.05), 0)["mlp.fc1"]
        fit.start()
        for part in torch.arange(6).split(4):
            fit.add(x[part], mixed[part], weights)
        fit.finish(theirs, fabric)
        rows = (weights / weights.sum() / 6).repeat(6).unsqueeze(1)
        x, mixed = x.flatten(0, 1), mixed.flatten(0, 1)
        second = x.T @ (rows * x)
        gram += second / second.norm()
        right += x.T @ (rows * mixed) @ theirs.weight.double().T / second.norm()
    anchor = torch.randn(64, 32, generator=generator).double()
    weight, _ = fit.solve(anchor, layer.bias.double(), 0.05)
    expected = torch.linalg.solve(gram + 0.05 * torch.eye(32), right + 0.05 * anchor.T).T
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_featcal_gives_both_families_of_clip_the_same_features(datasets, images):
    found = []
    for make in (hf_tower, openclip_tower):
        experts = fine_tuned(make)
        tower, pretrained = merge(make, experts)
        result = featcal(tower, pretrained, experts, datasets, data={"images": 8})
        assert type(result) is type(tower)
        found.append(result.features(images))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [hf_tower, dinov2_tower])
def test_featcal_leaves_a_merge_that_is_every_expert(make, images):
    tower = make(1, noise=0.05)
    same = {task: (lambda: copy.deepcopy(tower)) for task in TASKS}
    data = dict.fromkeys(TASKS, images)
    result = featcal(tower, make(), same, data, anchor=1.0)
    torch.testing.assert_close(
        result.features(images), tower.features(images), rtol=1e-3, atol=1e-3
    )
