"""Methods of others beside the repairs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TASKS, fine_tuned, hf_tower
from fusion_bench import BaseModelPool
from torch import nn

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.fusion import merge
from fusion_bench_intervmerge.fusion.comparison import ComparisonAlgorithm
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.fusion.rivals import (
    FusionBenchMethod,
    Storage,
    TallMasks,
)
from fusion_bench_intervmerge.model.protocols import Repair, TaskConditionalModel
from fusion_bench_intervmerge.results import parse_results

TASK_ARITHMETIC = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm", "scaling_factor": 0.3}
TALL_MASKS = f"{TallMasks.__module__}.TallMasks"
EMR = {"_target_": "fusion_bench.method.emr_merging.EMRMerging"}


@pytest.fixture
def pool():
    models = {"_pretrained_": hf_tower().model}
    models |= {task: load().model for task, load in fine_tuned(hf_tower).items()}
    experts = ExpertPool(BaseModelPool(models))
    experts._projection = hf_tower().projection  # live modules come without CLIP's
    return experts


def weights(tower):
    return {name: p.detach() for name, p in tower.mergeable().items()}


def vectors():
    zero = weights(hf_tower())
    experts = {t: weights(load()) for t, load in fine_tuned(hf_tower).items()}
    return zero, {t: {n: own[n] - zero[n] for n in zero} for t, own in experts.items()}


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1e9])
def test_tall_masks_by_their_formula(pool, threshold):
    zero, tau = vectors()
    method = TallMasks(threshold=threshold)
    model = method.repair(pool, hf_tower())
    for task in TASKS:
        for name, tensor in weights(model.tower_for(task)).items():
            total = sum(tau[t][name] for t in TASKS)
            mask = tau[task][name].abs() >= threshold * (total - tau[task][name]).abs()
            torch.testing.assert_close(tensor, zero[name] + mask * total)
            assert threshold or mask.all()
    numbers, result = sum(t.numel() for t in zero.values()), method.record(model)
    assert result.kind == "rival" and result.needs_task
    assert result.bytes == 4 * numbers + 3 * numbers // 8  # a vector, and a bit per number and task


@torch.no_grad()
def test_emr_merging_by_its_formula(pool, images):
    """theta0 + s_t * (m_t * tau): entries of the elected sign, the largest of them, rescaled."""
    method = FusionBenchMethod(method=EMR, storage={"models": 1, "bits": 1})
    model = method.repair(pool, hf_tower())
    assert isinstance(model, TaskConditionalModel) and model.tasks == TASKS
    zero, tau = vectors()
    sign = {n: torch.where(sum(tau[t][n] for t in TASKS) > 0, 1.0, -1.0) for n in zero}
    masks = {t: {n: tau[t][n] * sign[n] > 0 for n in zero} for t in TASKS}
    unified = {n: sign[n] * torch.stack([(masks[t][n] * tau[t][n]).abs() for t in TASKS]).amax(0)
               for n in zero}  # fmt: skip
    for task in [*TASKS, TASKS[0]]:  # back again: weights change in place
        means = [sum(of[n].abs().mean() for n in zero) for of in
                 (tau[task], {n: masks[task][n] * unified[n] for n in zero})]  # fmt: skip
        tower = hf_tower()
        for name, parameter in tower.mergeable().items():
            parameter.data += means[0] / means[1] * masks[task][name] * unified[name]
        torch.testing.assert_close(model.encode(images, task), tower.features(images))
    mixed = [TASKS[i % 3] for i in range(len(images))]  # as the union task pools ask
    by_task = {task: model.encode(images, task) for task in TASKS}
    wanted = torch.stack([by_task[task][row] for row, task in enumerate(mixed)])
    torch.testing.assert_close(model.encode(images, mixed), wanted)
    with pytest.raises(ValueError, match="no encoder for task 'dogs'"):
        model.encode(images, "dogs")
    assert torch.equal(model.encode(images), hf_tower().features(images))
    numbers = sum(t.numel() for t in zero.values())
    assert method.record(model).bytes == round(numbers * (4 + 3 / 8))


def test_what_is_stored_is_counted_once(pool):
    whole = FusionBenchMethod(method=EMR)
    stored = whole.record(whole.repair(pool, hf_tower())).bytes
    numbers = sum(t.numel() for t in vectors()[0].values())
    # the vector in fp32 and masks of a byte, with a projection and position ids beside them
    assert 4 * numbers + 3 * numbers <= stored <= 1.3 * (4 * numbers + 3 * numbers)
    assert Storage(models=2.0).bytes(100, 8) == 800 and Storage(bits=1.0).bytes(80, 8) == 80


class Takes(nn.Module):
    """A method that mixes both kinds of state dicts, as some of FusionBench's do."""

    def run(self, modelpool):
        models = [modelpool.load_model(name) for name in ("_pretrained_", "ants")]
        one, two = (model.state_dict(keep_vars=True) for model in models)
        for name, tensor in one.items():
            if type(tensor) is not type(two[name] - tensor):
                raise TypeError(f"Tensor type mismatch for key {name!r}")
        return {"first": models[0], "second": models[1]}


def test_some_methods_get_state_dicts_of_tensors(pool, monkeypatch):
    method = {"_target_": f"{__name__}.Takes"}
    with pytest.raises(TypeError, match="mismatch"):
        FusionBenchMethod(method=method, take="second").repair(pool, hf_tower())
    monkeypatch.setattr(merge, "WANT_TENSORS", __name__)
    model = FusionBenchMethod(method=method, take="second").repair(pool, hf_tower())
    own, expert = (next(m.parameters()) for m in (model, pool.pool.load_model("ants")))
    assert torch.equal(own, expert)
    with pytest.raises(ConfigError, match="gives a dict; allowed: a model, or one per task"):
        FusionBenchMethod(method=method).repair(pool, hf_tower())


class Fails(nn.Module):
    def run(self, modelpool):
        raise RuntimeError("no NVIDIA driver\nfound")


class FailingRepair(Repair):
    def repair(self, pool, merged):
        raise RuntimeError("no memory")


def comparison(**settings):
    given = {"bases": {"task_arithmetic": TASK_ARITHMETIC}, "methods": {}, "references": False}
    return ComparisonAlgorithm(**given | settings)


def test_a_failure_is_a_line_if_the_settings_say_so(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(ExpertPool, "_visual_projection", lambda self: hf_tower().projection)
    fails = {"_target_": f"{__name__}.Fails"}
    bases = {"broken": fails, "task_arithmetic": TASK_ARITHMETIC}
    settings = {"bases": bases, "rivals": {"emr": EMR, "gone": fails}}
    settings["methods"] = {"broken": {"_target_": f"{__name__}.FailingRepair"}}
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        comparison(**settings).run(pool.pool)
    algorithm = comparison(**settings, keep_going=True, images={"emr": {"split": "test"}})
    monkeypatch.setattr(type(algorithm), "log_dir", str(tmp_path))
    models = algorithm.run(pool.pool)
    assert list(models) == ["emr", "task_arithmetic"]
    results = parse_results(json.loads((tmp_path / "intervmerge.json").read_text()), "")
    line = "RuntimeError: no NVIDIA driver found"
    repair = {"task_arithmetic/broken": "RuntimeError: no memory"}
    assert results.problems == {"gone": line, "broken": line, **repair}
    assert results.models["emr"].images[0].split == "test"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rivals": {"x": {"name": ""}}}, "rivals.x: names no method"),
        ({"rivals": {"task_arithmetic": EMR}}, "rivals.task_arithmetic: a base has that name"),
        ({"rivals": {"x": {"_target_": TALL_MASKS, "keep": 1}}}, "rivals.x.keep"),
        ({"train_coefficients": {"task_arithmetic": []}}, "train_coefficients.task_arithmetic: no"),
        (
            {
                "coefficients": {"task_arithmetic": {"granularity": "task"}},
                "train_coefficients": {"task_arithmetic": ["gone"]},
            },
            "train_coefficients.task_arithmetic.gone: no such method",
        ),
        ({"images": {"gone": {}}}, "images.gone: no such base or rival"),
        ({"images": {"task_arithmetic": {"splt": "test"}}}, "images.task_arithmetic"),
        ({"methods": {"x": EMR}}, "methods.x._target_: .*EMRMerging is not a repair"),
        ({"methods": {"x": {"_target_": "no.such"}}}, "methods.x._target_: "),
        (
            {"methods": {"x": {"_target_": TALL_MASKS, "keep": 1}}},
            "methods.x.keep: no such setting",
        ),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        comparison(**settings)


@torch.no_grad()
def test_the_guides_rival_stands_in_a_comparison(pool, images):
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"```python\n(from torch import nn.*?)```", text, re.S)
    names: dict = {"__name__": __name__}
    exec(code, names)
    assert issubclass(names["NearestExpert"], Repair)
    model = names["NearestExpert"]().repair(pool, hf_tower())
    assert isinstance(model, TaskConditionalModel)
    for task, load in fine_tuned(hf_tower).items():
        assert torch.equal(model.encode(images, task), load().features(images))
    assert model.extra_parameters()["total"] > 0
