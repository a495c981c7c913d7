"""A training's state: one that does not fit is refused as a whole, and nothing is taken from it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from fusion_bench_intervmerge.data import RunFolder
from fusion_bench_intervmerge.distillation.states import Progress, load_state, save_state

STEPS = 9


def moved(optimizer=torch.optim.Adam, steps=4):
    """Two tensors and their optimizer after some steps."""
    torch.manual_seed(0)
    trained = {"ants.W1": torch.randn(2, 3), "bees.b": torch.randn(2)}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    optim = optimizer(list(trained.values()), lr=0.1)
    go_on(trained, optim, steps)
    return trained, optim


def go_on(trained, optim, steps):
    for _ in range(steps):
        optim.zero_grad()
        sum(tensor.square().sum() for tensor in trained.values()).backward()
        optim.step()


def load(path, trained, optim, run="r"):
    return load_state(RunFolder(path, run), Progress(0, torch.empty(0, 2)), STEPS, trained, optim)


@pytest.fixture
def state(tmp_path):
    assert save_state(RunFolder(tmp_path, "r"), Progress(4, torch.rand(4, 2)), *moved())
    (file,) = tmp_path.iterdir()
    return file


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]
)
def test_the_same_bits_from_a_state_as_without_a_stop(tmp_path, optimizer):
    save_state(RunFolder(tmp_path, "r"), Progress(4, torch.rand(4, 2)), *moved(optimizer))
    trained, optim = moved(optimizer, steps=0)
    progress = load(tmp_path, trained, optim)
    assert progress.step == 4 and progress.losses.shape == (4, 2)
    go_on(trained, optim, 3)
    expected, _ = moved(optimizer, steps=7)
    assert all(torch.equal(trained[name], expected[name]) for name in trained)


def torn(state):
    return None


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(step=10**6),
        lambda s: s.update(step=3),
        lambda s: s.update(run="other"),
        lambda s: s.pop("optimizer"),
        lambda s: s["optimizer"]["param_groups"].append({}),
        lambda s: s["trained"].pop("bees.b"),
        lambda s: s["trained"].update({"bees.b": torch.ones(3)}),
        lambda s: s["trained"].update({"bees.b": torch.ones(2).double()}),
        torn,
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_copied(state, change, caplog):
    content = torch.load(state, weights_only=True)
    change(content)
    torch.save(content, state)
    if change is torn:
        state.write_bytes(state.read_bytes()[:-100])
    trained, optim = moved(steps=0)
    before, entries = copy.deepcopy(trained), copy.deepcopy(optim.state_dict())
    with caplog.at_level(logging.WARNING):
        assert load(state.parent, trained, optim).step == 0
    assert all(torch.equal(trained[name], before[name]) for name in trained)
    assert optim.state_dict() == entries
    assert "is not used" in caplog.text
