"""Calibration in closed form: against dense algebra in float64, and through real encoders."""

from __future__ import annotations

import copy
import re

import lightning as L
import pytest
import torch
from conftest import TASKS, dinov2_patches_tower, dinov2_tower, fine_tuned, hf_tower, openclip_tower
from torch import Tensor
from torch.nn.functional import linear

from fusion_bench_intervmerge import calibrate
from fusion_bench_intervmerge.calibration import RIDGES, Sums, token_weights
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.data import Interrupted, RunFolder

FAMILIES = [hf_tower, openclip_tower, dinov2_tower, dinov2_patches_tower]


def merge(make, experts, factor=0.3, **options):
    """Task Arithmetic."""
    tower, pretrained = make(**options), make(**options)
    with torch.no_grad():
        for name, parameter in tower.mergeable().items():
            vectors = [expert().mergeable()[name] - parameter for expert in experts.values()]
            parameter += factor * sum(vectors)
    return tower, pretrained


@pytest.fixture
def merged(experts):
    return merge(hf_tower, experts)


def double_experts():
    """Three experts in float64."""
    return {
        task: (lambda load=load: load().double()) for task, load in fine_tuned(hf_tower).items()
    }


def dense(map_, anchor, rows, tokens, ridge) -> tuple[Tensor, Tensor]:
    """Ridge regression on all rows at once, towards an anchor: the textbook's normal equations."""
    x = torch.cat([x.flatten(0, 1) for x, _ in rows])
    y = torch.cat([y.flatten(0, 1) for _, y in rows])
    w = tokens.repeat(len(x) // len(tokens)).double().unsqueeze(1)
    mean = (w * x).sum(0) / w.sum()
    scale = (w * (x - mean).square()).sum(0).mean()
    X = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    penalty = torch.diag(torch.cat([(ridge * scale).expand(x.shape[1]), torch.zeros(1)]).double())
    right = X.T @ (w * y) + penalty @ torch.cat([anchor.T, torch.zeros(1, len(anchor))]).double()
    both = torch.linalg.solve(X.T @ (w * X) + penalty, right)
    return both[:-1].T, both[-1]


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_in_float64_each_map_is_a_dense_ridge_regression(datasets, ridge):
    experts = double_experts()
    tower, pretrained = merge(hf_tower, experts, dtype=torch.float64)
    fabric = L.Fabric(devices=1, accelerator="cpu", precision="64-true")
    options = {"ridge": ridge, "anchor": 1.5, "own_output": 0.2, "class_weight": 1.5}
    result = calibrate(tower, pretrained, experts, datasets, fabric=fabric, **options)
    states = {task: tower.embed(datasets[task].double()) for task in TASKS}
    towers = {task: load() for task, load in experts.items()}
    targets = {task: towers[task].embed(datasets[task].double()) for task in TASKS}
    for block in range(tower.num_blocks):
        last = block == tower.num_blocks - 1
        tokens = token_weights(tower, block, 24.0)
        assert tokens.tolist() == [24.0, *[0.0 if last else 1.0] * 16]
        for index in range(2):
            maps = [t.residual_maps(block)[index] for t in (result, tower, pretrained)]
            found, merged, first = maps
            rows = []
            for task in TASKS:
                own = towers[task].residual_maps(block)[index]
                targets[task] = own.add(targets[task])
                x, rest = found.reads(states[task]), targets[task] - states[task]
                rows.append((x, 0.8 * rest + 0.2 * linear(x, own.weight, own.bias)))
                states[task] = found.add(states[task])
            anchor = first.weight + 1.5 * (merged.weight - first.weight)
            weight, bias = dense(found, anchor, rows, tokens, ridge)
            torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(found.bias, bias, rtol=1e-8, atol=1e-8)


def test_cross_validation_leaves_out_whole_folds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, dtype=torch.float64, generator=generator) + 3
    y = x @ torch.randn(6, 4, dtype=torch.float64, generator=generator) + 1
    y += 2 * torch.randn(60, 4, dtype=torch.float64, generator=generator)
    weights = torch.rand(60, dtype=torch.float64, generator=generator) + 0.1
    anchor = torch.zeros(4, 6, dtype=torch.float64)
    folds = torch.arange(60) % 3

    def sums(rows: Tensor) -> Sums:
        made = Sums(3, anchor, anchor.new_zeros(4), x.mean(0))
        for fold in range(3):
            of = rows & (folds == fold)
            made.add(fold, x[of], y[of], weights[of])
        return made.gather(L.Fabric(devices=1, accelerator="cpu"))

    errors = []
    for ridge in RIDGES:
        error = 0.0
        for fold in range(3):
            weight, bias, _ = sums(folds != fold).solve(ridge)
            of = folds == fold
            error += (weights[of] * (y[of] - linear(x[of], weight, bias)).square().sum(1)).sum()
        errors.append(float(error))
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    assert 0 < best < len(RIDGES) - 1
    assert sums(folds >= 0).solve(None)[2] == RIDGES[best]


def test_it_comes_closer_to_every_expert_and_keeps_class_and_shapes(make_tower, datasets):
    experts = fine_tuned(make_tower)
    tower, pretrained = merge(make_tower, experts)
    before = copy.deepcopy(tower.weights())
    result = calibrate(tower, pretrained, experts, datasets)
    assert type(result) is type(tower)
    assert {n: (t.shape, t.dtype) for n, t in result.weights().items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    assert all(torch.equal(t, before[n]) for n, t in tower.weights().items())
    for task, load in experts.items():
        target = load().features(datasets[task])
        distance = [(t.features(datasets[task]) - target).square().mean() for t in (tower, result)]
        assert distance[1] < 0.97 * distance[0]


@pytest.mark.parametrize("make", FAMILIES)
def test_the_two_maps_are_all_that_a_block_adds(make, images):
    tower = make(1, noise=0.05)
    states = tower.embed(images)
    for block in range(tower.num_blocks):
        attention, mlp = tower.residual_maps(block)
        added = mlp.add(attention.add(states))
        torch.testing.assert_close(added, tower.run_block(block, states), rtol=1e-5, atol=1e-5)


def test_both_families_of_clip_get_the_same_weights(datasets):
    found = []
    for make in (hf_tower, openclip_tower):
        tower, pretrained = merge(make, fine_tuned(make))
        result = calibrate(tower, pretrained, fine_tuned(make), datasets)
        found.append([m for b in range(3) for m in result.residual_maps(b)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.bias, other.bias, rtol=1e-4, atol=1e-4)


def test_an_output_that_is_scaled_to_nothing_stays_as_it_is(datasets):
    experts = fine_tuned(dinov2_tower)
    tower, pretrained = merge(dinov2_tower, experts)
    scale = tower.residual_maps(1)[0].scale
    scale.data[3] = 0
    result = calibrate(tower, pretrained, experts, datasets).residual_maps(1)[0]
    before = tower.residual_maps(1)[0]
    assert torch.equal(result.weight[3], before.weight[3]) and result.weight.isfinite().all()
    assert not torch.equal(result.weight[4], before.weight[4])


def test_an_expert_that_is_the_merge_changes_no_feature(merged, images):
    tower, pretrained = merged
    same = {"ants": lambda: copy.deepcopy(tower)}
    for options in ({"ridge": 1e6}, {"ridge": 1e-4}, {}):
        result = calibrate(tower, pretrained, same, {"ants": images}, anchor=1.0, **options)
        torch.testing.assert_close(
            result.features(images), tower.features(images), rtol=1e-4, atol=1e-4
        )


def test_towards_the_anchor_as_the_ridge_grows(merged, experts, datasets):
    tower, pretrained = merged
    for ridge, close in ((1e12, True), (1e-3, False)):
        result = calibrate(tower, pretrained, experts, datasets, anchor=1.0, ridge=ridge)
        for block in range(tower.num_blocks):
            for one, other in zip(
                result.residual_maps(block), tower.residual_maps(block), strict=True
            ):
                assert torch.equal(one.weight, other.weight) is close


def stops_at_the_last_block(monkeypatch) -> list[int]:
    """Ctrl-C before the fifth map of three blocks; the list has an entry for each that began."""
    solved, original = [], Sums.solve

    def stops(self, *args):
        solved.append(0)
        if len(solved) == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Sums, "solve", stops)
    return solved


def test_a_stopped_run_goes_on_with_the_same_bits(merged, experts, datasets, tmp_path, monkeypatch):
    tower, pretrained = merged
    whole = calibrate(tower, pretrained, experts, datasets)
    solved = stops_at_the_last_block(monkeypatch)
    folder = RunFolder(tmp_path, "one")
    with pytest.raises(Interrupted, match="after block 1, map 1"):
        calibrate(tower, pretrained, experts, datasets, states=folder)
    result = calibrate(tower, pretrained, experts, datasets, states=folder)
    assert len(solved) == 5 + 2
    assert all(torch.equal(t, whole.weights()[n]) for n, t in result.weights().items())
    folder.file("map-0-0.pt").write_bytes(b"torn")
    calibrate(tower, pretrained, experts, datasets, states=folder)
    assert len(solved) == 5 + 2 + 1
    calibrate(tower, pretrained, experts, datasets, states=RunFolder(tmp_path, "another"))
    assert len(solved) == 5 + 2 + 1 + 6


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_image_per_task_is_enough(merged, experts, datasets, tasks):
    tower, pretrained = merged
    some = dict(list(experts.items())[:tasks])
    result = calibrate(tower, pretrained, some, datasets, data={"images": 1})
    assert all(t.isfinite().all() for t in result.weights().values())


def test_states_beyond_the_memory_change_nothing(merged, experts, datasets):
    tower, pretrained = merged
    found = [calibrate(tower, pretrained, experts, datasets, cache_gb=gb) for gb in (0.0, 1.0)]
    assert found[0].digest() == found[1].digest()


def test_bad_input_is_said_in_one_line(merged, experts, datasets):
    tower, pretrained = merged
    torn = hf_tower(1, noise=0.05)
    torn.residual_maps(1)[0].weight.data[2, 3] = torch.nan
    for arguments, options, line in (
        ((tower, pretrained, {}, datasets), {}, r"^modelpool\.models: there are no experts"),
        ((tower, pretrained, experts, {}), {}, "no images for task 'ants'"),
        ((tower, pretrained, experts, datasets | {"bees": []}), {}, "'bees' has no images"),
        ((tower, dinov2_tower(), experts, datasets), {}, r"models\._pretrained_: .* has shape"),
        ((tower, pretrained, experts | {"bees": dinov2_tower}, datasets), {}, r"models\.bees: "),
        (
            (tower, pretrained, experts | {"bees": lambda: torn}, datasets),
            {},
            r"models\.bees: .*fin",
        ),
        ((tower, pretrained, experts, datasets), {"ridge": 0.0}, "^ridge: 0.0; allowed: null"),
        ((tower, pretrained, experts, datasets), {"folds": 1}, "^folds: 1; allowed"),
        ((tower, pretrained, experts, datasets), {"anchr": 1}, "^anchr: no such setting"),
    ):
        with pytest.raises(ConfigError) as error:
            calibrate(*arguments, **options)
        assert re.search(line, str(error.value)) and "\n" not in str(error.value)
