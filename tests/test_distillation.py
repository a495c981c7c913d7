"""The trainer: published loss curves, invariants, shortcuts, resuming, more processes than one."""

from __future__ import annotations

import copy
import logging
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TASKS, acts, fine_tuned, hf_tower, openclip_tower, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_model import intervmerge, surgery_v2
from torch._dynamo.utils import counters

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.data import DataSettings, Interrupted, RunFolder, Schedule
from fusion_bench_intervmerge.distillation import loop
from fusion_bench_intervmerge.distillation.loop import DistillationError, FeatureCache, distill
from fusion_bench_intervmerge.distillation.settings import TripleStepAdam
from fusion_bench_intervmerge.merging import Mixture, mix, task_vector
from fusion_bench_intervmerge.model.model import InterventionModel

WORKER = Path(__file__).parent / "distill_worker.py"


# -- which images, and when ------------------------------------------------------------


@given(
    num_images=st.integers(1, 60),
    steps=st.integers(1, 20),
    batch_size=st.integers(1, 8),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_schedule_is_shuffled_epochs_of_one_subset(num_images, steps, batch_size, fraction, seed):
    data = DataSettings(batch_size=batch_size, fraction=fraction)
    schedule = Schedule("ants", num_images, steps, data, seed)
    seen = torch.tensor(schedule.unique)[schedule.rows].flatten().tolist()
    assert len(seen) == steps * batch_size
    size = len(Schedule("ants", num_images, 0, data, seed).unique)
    assert max(1, fraction * num_images) <= size + 1e-9 and size < fraction * num_images + 1
    for start in range(0, len(seen) - size + 1, size):
        assert set(seen[start : start + size]) == set(seen[:size])
    again = Schedule("ants", num_images, 2 * steps, data, seed)
    longer = torch.tensor(again.unique)[again.rows].flatten().tolist()
    assert longer[: len(seen)] == seen


def test_tasks_and_seeds_have_schedules_of_their_own():
    schedules = [
        Schedule(task, 100, 3, DataSettings(batch_size=8), seed).unique
        for task in ("ants", "bees")
        for seed in (0, 1)
    ]
    assert len({tuple(s) for s in schedules}) == 4


def test_a_task_without_images_has_no_schedule():
    with pytest.raises(ConfigError, match="task 'ants' has no images"):
        Schedule("ants", 0, 1, DataSettings())


# -- the published curves ------------------------------------------------------------


class PublishedOrder:
    """Batch s % 6 of eight images at step s, as the published curves were made."""

    def __init__(self, task, num_images, steps, data, seed):
        self.unique = list(range(num_images))
        self.rows = torch.stack([torch.arange(8) + 8 * (step % 6) for step in range(steps)])


def check_against_published(model, golden, golden_tower, names, loss="output"):
    """Losses and features; the training has to move every number and help every batch."""
    start = {name: p.detach().clone() for name, p in model.edits.named_parameters()}
    # The published runs went through their batches in order; ours are shuffled by design.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Schedule", PublishedOrder)
        losses = distill(
            model,
            {"a": lambda: golden_tower("expert")},
            {"a": golden["encoder.images"].flatten(0, 1)},
            steps=24,
            batch_size=8,
            loss=loss,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ).losses[:, 0]
    for name, parameter in model.edits.named_parameters():
        assert (parameter - start[name]).abs().max() > 5e-3, name
    assert (losses[-6:] < 0.95 * losses[:6]).all()
    assert relative(losses, golden[f"{names}.losses"]) < 1e-4
    with torch.no_grad():
        trained = model.encode(golden["encoder.images"][0], "a")
    assert relative(trained, golden[f"{names}.features.trained"]) < 1e-4
    assert acts(golden["encoder.features.plain"], trained)


def test_intervmerge_follows_the_published_curve(golden, golden_tower):
    start = InterventionModel(golden_tower("merged"), ["a"], {"attention": {"rank": 3}})
    check_against_published(intervmerge(golden, start), golden, golden_tower, "encoder")


def test_surgery_follows_the_published_curve(golden, golden_tower):
    model = InterventionModel(
        golden_tower("merged"), ["a"], {"output": {"function": "surgery", "rank": 3}}
    )
    with torch.no_grad():
        for name in ("down", "up"):
            tensor = getattr(model.edits_of("a")["output 0"], name)
            tensor.copy_(golden[f"surgery.init.{name}"])
        before = model.encode(golden["encoder.images"][0], "a")
    assert relative(before, golden["surgery.features"]) < 1e-5
    check_against_published(model, golden, golden_tower, "surgery")


def test_surgery_v2_follows_the_published_curve(golden, golden_tower):
    sites = {
        "output": {"function": "surgery", "rank": 3},
        "block": {"function": "surgery", "rank": 3, "tokens": "all"},
    }
    model = surgery_v2(golden, InterventionModel(golden_tower("merged"), ["a"], sites))
    check_against_published(model, golden, golden_tower, "surgery_v2", loss="blocks")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_triple_step_adam_is_adam_over_a_list_that_names_everything_three_times():
    ours, listed = (
        [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
        for _ in range(2)
    )
    optimizers = [
        TripleStepAdam(ours, lr=1e-3, foreach=False),
        torch.optim.Adam(listed * 3, lr=1e-3, foreach=False),
    ]
    for step in range(5):
        for tensors, optimizer in zip((ours, listed), optimizers, strict=True):
            for tensor in tensors:
                tensor.grad = (tensor * step).sin()
            optimizer.step()
    for a, b in zip(ours, listed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


# -- invariants ------------------------------------------------------------

SITES = [
    ({"attention": {"rank": 2}}, "output"),
    ({"attention": {"function": "loreft", "blocks": "last_1"}}, "output"),
    ({"output": {"function": "surgery", "rank": 3}}, "output"),
    (
        {
            "block": {"function": "surgery", "rank": 2, "tokens": "all"},
            "output": {"function": "surgery", "rank": 2},
        },
        "blocks",
    ),
]


@pytest.mark.parametrize(("sites", "loss"), SITES)
def test_together_equals_one_by_one(make_tower, datasets, images, sites, loss):
    experts = fine_tuned(make_tower)
    together = InterventionModel(make_tower(), TASKS, sites)
    alone = copy.deepcopy(together)
    run = {"steps": 12, "batch_size": 10, "loss": loss}
    done = distill(together, experts, datasets, **run)
    # two steps see all 20 images: of others the loss may be higher, whatever was learned
    assert done.losses[-2:].mean() < done.losses[:2].mean()
    pairs = zip(together.edits.parameters(), alone.edits.parameters(), strict=True)
    assert any(relative(trained, start) > 1e-2 for trained, start in pairs)
    for column, task in enumerate(TASKS):
        single = distill(alone, {task: experts[task]}, datasets, **run)
        assert relative(done.losses[:, column], single.losses[:, 0]) < 1e-5
    with torch.no_grad():
        for task in TASKS:
            assert relative(together.encode(images, task), alone.encode(images, task)) < 1e-5


def test_both_families_train_the_same_edits(datasets, images):
    models = []
    for make in (hf_tower, openclip_tower):
        model = InterventionModel(make(), TASKS, {"attention": {"rank": 2}})
        distill(model, fine_tuned(make), datasets, steps=12, batch_size=4)
        models.append(model)
    for ours, theirs in zip(
        models[0].edits.parameters(), models[1].edits.parameters(), strict=True
    ):
        assert relative(theirs, ours) < 1e-4
    with torch.no_grad():
        features = [model.encode(images, TASKS * 4) for model in models]
    assert relative(features[1], features[0]) < 1e-4


@pytest.mark.parametrize("blocks", ["all", "last_1"])
def test_images_kept_in_memory_or_read_again_give_the_same_numbers(experts, datasets, blocks):
    results = []
    for cache_gb in (1.0, 30e-6, 0.0):
        model = InterventionModel(hf_tower(), TASKS, {"attention": {"blocks": blocks}})
        done = distill(
            model, experts, datasets, steps=8, batch_size=4, cache_gb=cache_gb, num_workers=0
        )
        results.append(done.losses)
    assert relative(results[1], results[0]) < 1e-5 and relative(results[2], results[0]) < 1e-5


def test_images_that_are_kept_are_read_once(experts):
    class Counting(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 10

        def __getitem__(self, index):
            Counting.reads += 1
            return torch.full((3, 32, 32), index / 10), 0

    model = InterventionModel(hf_tower(), ["ants"], {"attention": {}})
    distill(model, {"ants": experts["ants"]}, {"ants": Counting()}, steps=10, batch_size=4)
    assert Counting.reads == 10


def test_a_task_is_added_without_touching_the_others(experts, datasets, images):
    model = InterventionModel(hf_tower(), TASKS[:2], {"attention": {}})
    distill(model, {t: experts[t] for t in TASKS[:2]}, datasets, steps=5, batch_size=4)
    with torch.no_grad():
        before = [model.encode(images, task) for task in TASKS[:2]]
    model.add_task("cats")
    distill(model, {"cats": experts["cats"]}, datasets, steps=5, batch_size=4)
    whole = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    distill(whole, experts, datasets, steps=5, batch_size=4)
    with torch.no_grad():
        for task, features in zip(TASKS[:2], before, strict=True):
            assert torch.equal(model.encode(images, task), features)
        assert relative(model.encode(images, "cats"), whole.encode(images, "cats")) < 1e-5


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_trained_coefficients_follow_autograd(experts, datasets, granularity):
    """Against the mixture written as one differentiable expression, in float64."""
    tower = hf_tower(dtype=torch.float64)
    theta0 = {name: p.detach().clone() for name, p in tower.mergeable().items()}
    vectors = [
        task_vector(hf_tower(s, 0.05, torch.float64).mergeable(), theta0)
        for s in range(1, len(TASKS) + 1)
    ]
    shape = (3,) if granularity == "task" else (3, len(theta0))
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(shape, generator=generator) * 1.4 - 0.2  # some outside [0, 1]
    mixture = Mixture(theta0, vectors, start, torch.float64)
    pixels = datasets["ants"][:4].double()

    mixture.write(tower)
    for parameter in tower.mergeable().values():
        parameter.requires_grad_(True)
    tower.features(pixels).abs().mean().backward()
    mixture.collect_gradient(tower)

    coefficients = start.double().requires_grad_(True)
    used = coefficients.clamp(0, 1)
    used = used if used.dim() == 2 else used[:, None].expand(-1, len(theta0))
    weights = {
        f"model.{name}": theta0[name] + sum(used[t, i] * vectors[t][name] for t in range(3))
        for i, name in enumerate(tower.mergeable())
    }

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tower

        def forward(self, x):
            return self.tower.features(x)

    weights = {f"tower.{name}": value for name, value in weights.items()}
    expected = torch.func.functional_call(Features(), weights, (pixels,)).abs().mean()
    expected.backward()
    torch.testing.assert_close(
        mixture.coefficients.grad, coefficients.grad.float(), rtol=1e-5, atol=1e-8
    )


def test_coefficients_train_along_with_the_edits(experts, datasets, images):
    tower = hf_tower()
    start = torch.full((3, len(tower.mergeable())), 0.3)
    mixture = mix(tower, (experts[task]() for task in TASKS), start)
    model = InterventionModel(tower, TASKS, {"attention": {}})
    done = distill(model, experts, datasets, steps=12, batch_size=4, mixture=mixture)
    assert done.losses[-4:].mean() < done.losses[:4].mean()
    assert (mixture.coefficients - 0.3).abs().max() > 1e-3
    again = hf_tower()
    mixture.write(again)
    with torch.no_grad():
        assert torch.equal(model.encode(images), again.features(images))
    assert not any(p.requires_grad for p in model.tower.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_lower_precision_comes_close_and_leaves_the_merged_weights_alone(
    experts, datasets, precision
):
    full = InterventionModel(hf_tower(), TASKS, {"attention": {"rank": 2}})
    low = copy.deepcopy(full)
    digest = low.tower.digest()
    run = {"steps": 10, "batch_size": 4}
    reference = distill(full, experts, datasets, **run).losses
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    if precision == "16-mixed":  # Fabric has no fp16 on the CPU; the loop's own part is what counts
        fabric._precision.precision = precision
    found = distill(low, experts, datasets, fabric=fabric, **run).losses
    assert relative(found, reference) < 0.05
    assert low.tower.digest() == digest
    assert all(p.dtype == torch.float32 for p in low.edits.parameters())


def plain_double_training(model, experts, datasets, steps, mixture):
    """The same training, written out in float64 with nothing but autograd."""
    model, mixture = copy.deepcopy(model).double(), copy.deepcopy(mixture).double()
    moving = [*model.edits.parameters(), mixture.coefficients]
    optimizer = torch.optim.Adam(moving, lr=3e-3)
    targets = {}
    with torch.no_grad():
        for task in TASKS:
            targets[task] = experts[task]().double().features(datasets[task].double())
    schedules = {t: Schedule(t, len(datasets[t]), steps, DataSettings(batch_size=4)) for t in TASKS}
    for step in range(steps):
        optimizer.zero_grad()
        mixture.write(model.tower)
        for parameter in model.tower.mergeable().values():
            parameter.requires_grad_(True)
        for task, schedule in schedules.items():
            images = torch.tensor(schedule.unique)[schedule.rows[step]]
            found = model.encode(datasets[task][images].double(), task)
            (found - targets[task][images]).abs().mean().backward()
        mixture.collect_gradient(model.tower)
        optimizer.step()
    return [parameter.detach() for parameter in moving]


def test_64_true_trains_in_double_precision(experts, datasets):
    sites, run = {"attention": {"function": "loreft", "rank": 2}}, {"steps": 6, "batch_size": 4}
    tower = hf_tower()
    mixture = mix(tower, (experts[task]() for task in TASKS), torch.full((3,), 0.3))
    single = InterventionModel(tower, TASKS, sites)
    expected = plain_double_training(single, experts, datasets, 6, mixture)
    errors = []
    for precision in ("64-true", "32-true"):
        model, mixed = copy.deepcopy(single), copy.deepcopy(mixture)
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
        distill(model, experts, datasets, fabric=fabric, mixture=mixed, **run)
        found = [*model.edits.parameters(), mixed.coefficients]
        assert all(p.dtype == torch.float32 for p in found)
        errors.append(max(relative(a.double(), b) for a, b in zip(found, expected, strict=True)))
    # at the end the numbers are rounded to fp32 once
    assert errors[0] < 2**-23 < errors[1]


def test_a_precision_that_is_not_known_is_refused(experts, datasets):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric._precision.precision = "transformer-engine"  # its package is not here
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(ConfigError, match=r"fabric\.precision: 'transformer-engine'; allowed: 64-"):
        distill(model, experts, datasets, steps=1, fabric=fabric)


# -- what can go wrong ------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(experts, datasets, tmp_path):
    poisoned = datasets["bees"].clone()
    schedule = Schedule("bees", len(poisoned), 6, DataSettings(batch_size=4))
    poisoned[schedule.unique[9]] = float("nan")  # first shown at step 2
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(DistillationError, match="'bees' is not finite at step 2") as error:
        distill(
            model,
            experts,
            datasets | {"bees": poisoned},
            steps=6,
            batch_size=4,
            states=RunFolder(tmp_path, "r"),
            save_every=100,
        )
    assert str(tmp_path) in str(error.value)
    (file,) = tmp_path.iterdir()
    state = torch.load(file, weights_only=True)
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["trained"].values())
    assert all(torch.isfinite(p).all() for p in model.edits.parameters())


def test_missing_images(experts, datasets):
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(ConfigError, match="no images for task 'cats'"):
        distill(model, experts, {t: datasets[t] for t in TASKS[:2]}, steps=1)


# -- stopping and going on ------------------------------------------------------------


def run_worker(tmp_path, name, *more, steps=30):
    command = [sys.executable, str(WORKER), str(tmp_path / name), str(tmp_path / "s"), str(steps)]
    done = subprocess.run([*command, *map(str, more)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(tmp_path / name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("undisturbed"), "whole")


def test_killed_and_resumed_it_gives_the_same_bits(tmp_path, undisturbed):
    moments = sorted(random.Random(0).sample(range(1, 29), 4))
    resumed = run_worker(tmp_path, "killed", 0.01, 1, ",".join(map(str, moments)))
    assert resumed["resumed_at"] >= moments[-1]
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[n], undisturbed[n]) for n in resumed if n != "resumed_at")
    assert not list((tmp_path / "s").glob("*")), "a finished run leaves no state behind"


def interrupted(tmp_path, experts, datasets, run="r", steps=10):
    """A run of ten steps that was stopped after six."""
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    step, calls = loop._Trainer._step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="after step 6"):
        patch.setattr(loop._Trainer, "_step", stopping)
        distill(
            model,
            experts,
            datasets,
            steps=steps,
            batch_size=4,
            states=RunFolder(tmp_path, run),
            save_every=2,
        )


def test_ctrl_c_is_one_line_wherever_it_comes(experts, datasets, tmp_path, monkeypatch):
    def pressed(*args):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^stopped while reading the experts' features$"):
        finish(tmp_path, experts | {"bees": pressed}, datasets)
    interrupted(tmp_path, experts, datasets)
    with pytest.raises(Interrupted, match=r"features; the same command goes on from step 6$"):
        finish(tmp_path, experts | {"bees": pressed}, datasets)
    # the second Ctrl-C, which does not wait for the step's end
    monkeypatch.setattr(loop._Trainer, "_step", pressed)
    with pytest.raises(Interrupted, match=r"^stopped while training; the same .* from step 6$"):
        finish(tmp_path, experts, datasets)


def finish(tmp_path, experts, datasets, run="r"):
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    return distill(
        model, experts, datasets, steps=10, batch_size=4, states=RunFolder(tmp_path, run)
    )


def test_a_finished_training_is_found_until_it_is_cleared(experts, datasets, tmp_path, monkeypatch):
    """Killed between the training's end and the save, nothing is trained twice."""
    first = finish(tmp_path, experts, datasets)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_step", None)  # no step is left to be done
        found = finish(tmp_path, experts, datasets)
    assert found.resumed_at == 10 and torch.equal(found.losses, first.losses)
    for task, features in first.expert_features.items():
        assert torch.equal(found.expert_features[task], features)
    found.clear()
    assert not tmp_path.exists() and finish(tmp_path, experts, datasets).resumed_at == 0


def test_a_full_disk_is_reported_and_training_goes_on(
    experts, datasets, tmp_path, caplog, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)  # a test has no full disk
    with caplog.at_level(logging.WARNING):
        done = finish(tmp_path / "s", experts, datasets)
    assert len(done.losses) == 10 and "No space left on device" in caplog.text
    done.clear()
    assert not list(tmp_path.rglob("*"))


def test_two_processes_give_what_one_gives(tmp_path, undisturbed):
    two = run_worker(tmp_path, "two", 0.0, 2)
    assert two.keys() == undisturbed.keys()
    # Softmax does not feel a bias of the keys: that gradient is noise, which Adam scales up.
    felt = torch.tensor(["k_proj.bias" not in name for name in hf_tower().mergeable()])
    for name, value in undisturbed.items():
        if name == "coefficients":
            assert relative(two[name][:, felt], value[:, felt]) < 1e-4
        elif name != "resumed_at":
            assert relative(two[name], value) < 1e-4, name


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compiled_blocks_train_the_same_edits(datasets):
    """Another kernel's rounding and no more; and the model is left as it was."""
    found = []
    torch._dynamo.reset()
    counters.clear()
    for compile in (False, True):
        model = InterventionModel(hf_tower(), TASKS, {"attention": {"rank": 2}})
        distill(model, fine_tuned(hf_tower), datasets, steps=5, batch_size=4, compile=compile)
        found.append(model.state_dict())
        assert all(m._compiled_call_impl is None for m in model.modules())
    assert not counters["graph_break"]  # a block is one graph, its edits in it
    assert counters["stats"]["unique_graphs"] == 1  # and no step compiles it anew
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-4), name


# -- experts' representations, computed once -------------------------------------------------------


@pytest.mark.parametrize("loss", ["output", "blocks"])
def test_the_next_method_finds_the_experts_representations(experts, datasets, loss):
    loads = []

    def run(cache, function="noreft", **options):
        loads.clear()
        model = InterventionModel(hf_tower(), TASKS, {"attention": {"function": function}})
        counting = {t: lambda t=t: (loads.append(t), experts[t]())[1] for t in TASKS}
        options = {"steps": 3, "batch_size": 4, "loss": loss} | options
        return distill(model, counting, datasets, cache=cache, **options).losses

    cache = FeatureCache()
    without, missed = run(None), run(cache)
    assert loads == TASKS and torch.equal(without, missed)
    assert torch.equal(run(cache), missed) and not loads
    run(cache, "nodireft")  # another method
    assert not loads
    run(cache, seed=1)  # other images
    assert loads == TASKS


def test_representations_are_kept_while_there_is_room():
    cache = FeatureCache(limit=2 * 40)
    for key in "abc":
        cache.put(key, {"output": torch.zeros(10)})
    assert list(cache) == ["a", "b"]
