"""Maps and edits solved together: against dense algebra in float64, and through real encoders."""

from __future__ import annotations

import copy
import re

import lightning as L
import pytest
import torch
from conftest import TASKS, fine_tuned, hf_tower
from test_calibration import dense, double_experts, merge, stops_at_the_last_block

from fusion_bench_intervmerge import InterventionModel, calibrate, recalibrate, solve
from fusion_bench_intervmerge.calibration import CalibrationSettings, token_weights
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.data import Interrupted, RunFolder
from fusion_bench_intervmerge.solving.regression import Moments, Regression

SITES = {"block": {"function": "nodireft", "tokens": "all", "init": "regression", "rank": 2}}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # edits are kept in float32
LATE = {"block": {**SITES["block"], "blocks": [2]}}


def calibrated(make, experts, datasets, sites=SITES, **options):
    """A model with edits on a calibrated merge; the merge, and what it comes from."""
    tower, pretrained = merge(make, experts, **options)
    model = InterventionModel(calibrate(tower, pretrained, experts, datasets), TASKS, sites)
    solve(model, experts, datasets)
    return model, tower, pretrained


def distance(model, experts, datasets):
    return sum(
        (model.encode(datasets[task], task) - load().features(datasets[task])).square().mean()
        for task, load in experts.items()
    )


def test_in_float64_maps_and_edits_are_dense_regressions_on_the_edited_streams(datasets):
    experts = double_experts()
    double = {task: images.double() for task, images in datasets.items()}
    fabric = L.Fabric(devices=1, accelerator="cpu", precision="64-true")
    model, tower, pretrained = calibrated(hf_tower, experts, double, dtype=torch.float64)
    model.edits_of("bees").set_rank("block", 1, 0)  # stays without an edit there
    how = CalibrationSettings(ridge=0.3, anchor=1.5, class_weight=1.5)
    about = {"edit_ridge": 0.05, "fabric": fabric}
    recalibrate(model, tower, pretrained, experts, double, how, **about)
    towers = {task: load() for task, load in experts.items()}
    states = {task: tower.embed(double[task]) for task in TASKS}
    targets = {task: towers[task].embed(double[task]) for task in TASKS}
    for block in range(tower.num_blocks):
        for index in range(2):
            maps = [t.residual_maps(block)[index] for t in (model.tower, tower, pretrained)]
            found, merged, first = maps
            rows = []
            for task in TASKS:
                targets[task] = towers[task].residual_maps(block)[index].add(targets[task])
                rows.append((found.reads(states[task]), targets[task] - states[task]))
                states[task] = found.add(states[task])
            anchor = first.weight + 1.5 * (merged.weight - first.weight)
            tokens = token_weights(tower, block, 1.5 * 16)
            weight, bias = dense(found, anchor, rows, tokens, 0.3)
            torch.testing.assert_close(found.weight, weight, **CLOSE)
            torch.testing.assert_close(found.bias, bias, **CLOSE)
        tokens = token_weights(tower, block, 0.5 * 16).double()
        for task in TASKS:
            if task == "bees" and block == 1:
                assert model.edits_of(task).at("block", block) is None
                continue
            z, missing = states[task], targets[task] - states[task]
            rows = z.flatten(0, 1)[None], missing.flatten(0, 1)[None], tokens.repeat(len(z))[None]
            (W1,), (W2,), (b,) = Regression(Moments.of(*rows), 0.05).affine(2)
            states[task] = z + (z @ W1.T + b) @ W2
    for task in TASKS:
        features = tower.readout(states[task])
        torch.testing.assert_close(model.encode(double[task], task), features, **CLOSE)


def test_without_edits_it_is_calibration_to_the_bit(experts, datasets):
    model, tower, pretrained = calibrated(hf_tower, experts, datasets)
    before = model.tower.digest()
    for task in TASKS:
        for block in range(tower.num_blocks):
            model.edits_of(task).set_rank("block", block, 0)
    recalibrate(model, tower, pretrained, experts, datasets)
    assert model.tower.digest() == before


@pytest.mark.parametrize("sites", [SITES, LATE], ids=["everywhere", "last block"])
def test_ranks_stay_and_the_blocks_before_the_first_edit(make_tower, datasets, sites):
    experts = fine_tuned(make_tower)
    model, tower, pretrained = calibrated(make_tower, experts, datasets, sites)
    first = min(model.placements["block"].blocks)
    before, ranks = copy.deepcopy(model.tower), [model.edits_of(t).ranks() for t in TASKS]
    recalibrate(model, tower, pretrained, experts, datasets)
    assert [model.edits_of(task).ranks() for task in TASKS] == ranks
    for block in range(tower.num_blocks):
        maps = zip(model.tower.residual_maps(block), before.residual_maps(block), strict=True)
        same = [torch.equal(new.weight, old.weight) for new, old in maps]
        assert same == [block <= first] * 2  # the first edit comes behind its block's maps
    for task in TASKS:
        assert model.encode(datasets[task], task).isfinite().all()


def test_together_they_come_closer_to_the_experts(experts, datasets):
    model, tower, pretrained = calibrated(hf_tower, experts, datasets)
    on_top = distance(model, experts, datasets)
    recalibrate(model, tower, pretrained, experts, datasets)
    assert distance(model, experts, datasets) < on_top


def test_a_stopped_run_goes_on_with_the_same_bits(experts, datasets, tmp_path, monkeypatch):
    whole, tower, pretrained = calibrated(hf_tower, experts, datasets)
    stopped = copy.deepcopy(whole)
    recalibrate(whole, tower, pretrained, experts, datasets)
    solved = stops_at_the_last_block(monkeypatch)
    before = copy.deepcopy(stopped)
    folder = RunFolder(tmp_path, "one")
    with pytest.raises(Interrupted, match="after block 1, map 1"):
        recalibrate(stopped, tower, pretrained, experts, datasets, states=folder)
    for task in TASKS:  # as it was, not without its edits
        assert torch.equal(
            stopped.encode(datasets[task], task), before.encode(datasets[task], task)
        )
    recalibrate(stopped, tower, pretrained, experts, datasets, states=folder)
    assert len(solved) == 5 + 2
    for task in TASKS:
        again, once = (m.encode(datasets[task], task) for m in (stopped, whole))
        assert torch.equal(again, once)


def test_edits_elsewhere_are_refused_in_one_line(experts, datasets):
    sites = {"attention": {"function": "noreft", "rank": 1, "init": "regression"}}
    model, tower, pretrained = calibrated(hf_tower, experts, datasets, sites | SITES)
    line = "recalibrate: edits at attention cannot be solved together with the maps; allowed: false"
    with pytest.raises(ConfigError, match=re.escape(line)) as error:
        recalibrate(model, tower, pretrained, experts, datasets)
    assert "\n" not in str(error.value)
