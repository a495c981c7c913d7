"""A run's states: one that is not sound is refused as a whole, and nothing is taken from it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusion_bench_intervmerge.data import digest_of
from fusion_bench_intervmerge.distillation.states import Progress, StateFolder

STEPS = 9


def start():
    return Progress(0, torch.empty(0, 2))


def moved(optimizer=torch.optim.Adam, steps=4):
    """Two tensors and their optimizer after some steps."""
    torch.manual_seed(0)
    trained = {"ants.W1": torch.randn(2, 3), "bees.b": torch.randn(2)}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    optim = optimizer(list(trained.values()), lr=0.1)
    for _ in range(steps):
        optim.zero_grad()
        sum(tensor.square().sum() for tensor in trained.values()).backward()
        optim.step()
    return trained, optim


def saved(folder, steps=4, **kwargs):
    trained, optim = moved(steps=steps, **kwargs)
    return StateFolder(folder, "r").save(Progress(steps, torch.rand(steps, 2)), trained, optim)


def load(folder, optimizer=torch.optim.Adam, run="r"):
    """What a fresh run takes over: progress, and whether anything of it was touched."""
    trained, optim = moved(optimizer, steps=0)
    before, entries = copy.deepcopy(trained), copy.deepcopy(optim.state_dict())
    progress = StateFolder(folder, run).load(start(), STEPS, trained, optim)
    same = all(torch.equal(trained[name], before[name]) for name in trained)
    return progress, not (same and optim.state_dict() == entries)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]
)
def test_a_sound_state_is_taken_over_whole(tmp_path, optimizer):
    saved(tmp_path, optimizer=optimizer)
    trained, optim = moved(optimizer, steps=0)
    progress = StateFolder(tmp_path, "r").load(start(), STEPS, trained, optim)
    expected, theirs = moved(optimizer)
    assert progress.step == 4 and progress.losses.shape == (4, 2)
    for _ in range(3):  # the same steps from here on
        for tensors, each in ((trained, optim), (expected, theirs)):
            each.zero_grad()
            sum(tensor.square().sum() for tensor in tensors.values()).backward()
            each.step()
    assert all(torch.equal(trained[name], expected[name]) for name in trained)


def test_without_an_optimizer(tmp_path):
    tensors = {"W1": torch.ones(3)}
    StateFolder(tmp_path, "r").save(Progress(2, torch.zeros(2, 2)), tensors)
    found = {"W1": torch.zeros(3)}
    assert StateFolder(tmp_path, "r").load(start(), 2, found).step == 2
    assert torch.equal(found["W1"], tensors["W1"])


def test_a_flipped_bit_anywhere_is_noticed(tmp_path, caplog):
    path = saved(tmp_path)
    content = path.read_bytes()
    assert load(tmp_path)[0].step == 4
    with caplog.at_level(logging.CRITICAL):
        for bit in range(0, 8 * len(content), 41):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            progress, touched = load(tmp_path)
            assert progress.step == 0 and not touched, f"bit {bit} of {8 * len(content)}"


def rewritten(path, change):
    """The state with something else in it, and a digest that fits."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    header.pop("digest")
    save_file(tensors, path, {**header, "digest": digest_of(tensors, header)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, t: h.update(step="1000000"), "it is of step 1000000, of 9"),
        (lambda h, t: h.update(step="-1"), "it is of step -1"),
        (lambda h, t: h.update(step="3"), "its losses is ((4, 2)"),
        (lambda h, t: h.update(run="other"), "another run"),
        (lambda h, t: t.pop("trained.bees.b"), "it lacks bees.b"),
        (lambda h, t: t.update({"trained.cats.b": torch.ones(2)}), "an unknown cats.b"),
        (lambda h, t: t.update({"trained.bees.b": torch.ones(3)}), "bees.b is ((3,)"),
        (lambda h, t: t.update({"trained.bees.b": torch.ones(2).double()}), "torch.float64"),
        (lambda h, t: t.pop("optimizer.1.exp_avg_sq"), "it lacks 1.exp_avg_sq"),
        (lambda h, t: t.update({"optimizer.0.exp_avg": torch.ones(1)}), "0.exp_avg is ((1,)"),
        (lambda h, t: [t.pop(n) for n in list(t) if n.startswith("optimizer.1")], "it lacks 1."),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_copied(
    tmp_path, caplog, change, said
):
    path = saved(tmp_path)
    rewritten(path, change)
    with caplog.at_level(logging.WARNING):
        progress, touched = load(tmp_path)
    assert progress.step == 0 and not touched
    assert path.name in caplog.text and said in caplog.text


def test_the_older_state_is_used_where_the_newest_is_not_sound(tmp_path):
    saved(tmp_path, steps=2)
    rewritten(saved(tmp_path, steps=4), lambda header, tensors: tensors.pop("losses").sum())
    progress, touched = load(tmp_path)
    assert progress.step == 2 and touched
