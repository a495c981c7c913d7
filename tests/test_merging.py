"""Task vectors, their mixture, and where coefficients come from."""

from __future__ import annotations

import pytest
import torch
from conftest import fine_tuned, hf_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.merging import (
    CoefficientSettings,
    Mixture,
    initial_coefficients,
    mix,
    task_vector,
    trim,
)


@pytest.fixture(scope="module")
def parts():
    theta0 = {name: p.detach().clone() for name, p in hf_tower().mergeable().items()}
    experts = fine_tuned(hf_tower).values()
    return theta0, [task_vector(load().mergeable(), theta0) for load in experts]


def mixed(theta0, vectors, coefficients, **options):
    tower = hf_tower()
    Mixture(theta0, vectors, coefficients, **options).write(tower)
    return [p.detach() for p in tower.mergeable().values()]


def test_coefficients_act_within_zero_and_one(parts):
    theta0, vectors = parts
    outside = mixed(theta0, vectors, torch.tensor([-3.0, 2.0, 0.5]))
    inside = mixed(theta0, vectors, torch.tensor([0.0, 1.0, 0.5]))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_task_wise_is_layer_wise_with_equal_columns(parts):
    theta0, vectors = parts
    per_task = torch.tensor([0.1, 0.4, 0.3])
    per_layer = per_task[:, None].expand(-1, len(theta0)).clone()
    for a, b in zip(
        mixed(theta0, vectors, per_task), mixed(theta0, vectors, per_layer), strict=True
    ):
        assert torch.equal(a, b)


def test_a_small_step_of_a_coefficient_acts_on_task_vectors_in_bfloat16(parts):
    """bfloat16 knows no number between 0.3008 and 0.3027."""
    theta0, vectors = parts
    before, after = (
        mixed(theta0, vectors, torch.tensor([value, 0.3, 0.3]), dtype=torch.bfloat16)
        for value in (0.3, 0.301)
    )
    for old, new, tau in zip(before, after, vectors[0].values(), strict=True):
        torch.testing.assert_close(new - old, 0.001 * tau, rtol=0.02, atol=3e-7)


def fusion_bench_pool():
    from fusion_bench import BaseModelPool

    models = {"_pretrained_": hf_tower().model}
    models |= {task: load().model for task, load in fine_tuned(hf_tower).items()}
    return BaseModelPool(models)


def test_plain_task_vectors_give_fusionbenchs_task_arithmetic(parts):
    from fusion_bench.method import TaskArithmeticAlgorithm

    theirs = TaskArithmeticAlgorithm(scaling_factor=0.3).run(fusion_bench_pool())
    ours = mixed(*parts, torch.full((3,), 0.3))
    for a, b in zip(ours, theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


def test_trimmed_and_elected_they_give_fusionbenchs_ties_merging():
    from fusion_bench.method import TiesMergingAlgorithm

    tower = hf_tower()
    ties = CoefficientSettings.read({"task_vectors": "ties"}, "coefficients")
    mix(tower, (load() for load in fine_tuned(hf_tower).values()), torch.full((3,), 0.3), ties)
    ours = [p.detach() for p in tower.mergeable().values()]
    method = TiesMergingAlgorithm(
        scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"
    )
    theirs = method.run(fusion_bench_pool())
    for a, b in zip(ours, theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


def entries(vector):
    return torch.cat([tensor.flatten() for tensor in vector.values()])


@given(keep=st.floats(0.01, 1.0), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_trimming_keeps_the_largest(keep, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (30,)}
    vector = {name: torch.randn(s, generator=generator) for name, s in shapes.items()}
    flat = entries(vector).abs()
    kept = entries(trim(vector, keep)).abs()
    assert (kept > 0).sum() in (int(keep * 65), int(keep * 65) + 1)
    dropped = flat[kept == 0]
    assert dropped.numel() == 0 or flat[kept > 0].min() >= dropped.max()


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_coefficients_from_a_number_and_from_adamergings_file(granularity, tmp_path):
    shape = (3,) if granularity == "task" else (3, 7)
    assert torch.equal(initial_coefficients(0.3, 3, 7, granularity), torch.full(shape, 0.3))
    assert torch.equal(initial_coefficients("mean", 3, 7, granularity), torch.full(shape, 1 / 3))
    saved = torch.rand(shape)
    assert torch.equal(initial_coefficients(saved.tolist(), 3, 7, granularity), saved)
    torch.save(saved, tmp_path / "merging_weights.pt")
    found = initial_coefficients(str(tmp_path / "merging_weights.pt"), 3, 7, granularity)
    assert torch.equal(found, saved)
    save_file({"coefficients": saved}, tmp_path / "c.safetensors")
    assert torch.equal(initial_coefficients(tmp_path / "c.safetensors", 3, 7, granularity), saved)


def test_files_that_hold_no_coefficients(tmp_path):
    torch.save(torch.rand(2, 7), tmp_path / "two.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    (tmp_path / "code.pt").write_bytes(b"no tensor")
    for name, message in [
        ("none.pt", "there is no file"),
        ("two.pt", r"shape \(2, 7\) do not fit"),
        ("dict.pt", "holds a dict"),
        ("code.pt", "holds no coefficients"),
    ]:
        with pytest.raises(ConfigError, match=message):
            initial_coefficients(tmp_path / name, 3, 7, "layer")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"granularity": "block"}, "coefficients.granularity: 'block'; allowed: task, layer"),
        ({"task_vectors": "dare"}, "coefficients.task_vectors: 'dare'; allowed: plain, ties"),
        ({"keep": 0}, "coefficients.keep"),
        ({"lambda": 1}, "coefficients.lambda: no such setting"),
    ],
)
def test_settings_that_do_not_exist(settings_, message):
    with pytest.raises(ConfigError) as error:
        CoefficientSettings.read(settings_, "coefficients")
    assert message in str(error.value)
