"""Edits in closed form: against dense algebra in float64, and through real encoders."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import (
    TASKS,
    dinov2_patches_tower,
    dinov2_tower,
    fine_tuned,
    hf_tower,
    openclip_tower,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.data import RunFolder
from fusion_bench_intervmerge.distillation import loop
from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.interventions.functions import build_function
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving import sweep
from fusion_bench_intervmerge.solving.regression import Moments, Regression
from fusion_bench_intervmerge.solving.solve import allocate, solve, solved_places

ROWS, WIDTH = 90, 7
BLOCK = {"function": "nodireft", "tokens": "all", "init": "regression", "rank": 2}


@pytest.fixture(scope="module")
def rows():
    """x, y and weights of a regression that no low rank fits exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, ROWS, WIDTH, dtype=torch.float64, generator=generator) + 3
    mixing = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    noise = torch.randn(1, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    weights = torch.rand(1, ROWS, dtype=torch.float64, generator=generator) + 0.1
    return x, x @ mixing + noise, weights


def streamed(x, y, weights, batch=17):
    moments = Moments.none(WIDTH, len(x))
    for part in torch.arange(x.shape[1]).split(batch):
        moments.merge(Moments.of(x[:, part], y[:, part], weights[:, part]))
    return moments


def distance(x, y, weights, z):
    """The weighted mean squared distance that an edit of x to z leaves."""
    return ((x + y - z).square().sum(-1) * weights).sum() / weights.sum()


def dense(x, y, weights, rank, ridge):
    """Reduced-rank regression as the textbook has it: W^(1/2) X B and its singular vectors."""
    x, y, root = x[0], y[0], weights[0].sqrt().unsqueeze(1)
    mean = (weights[0].unsqueeze(1) * x).sum(0) / weights.sum()
    X = torch.cat([(x - mean), torch.ones(ROWS, 1, dtype=x.dtype)], dim=1) * root
    penalty = ridge * (X[:, :-1].square().sum(0).mean()) * torch.eye(WIDTH + 1, dtype=x.dtype)
    penalty[-1, -1] = 0  # the constant is not penalised
    B = torch.linalg.solve(X.T @ X + penalty, X.T @ (y * root))
    V = torch.linalg.svd(X @ B, full_matrices=False).Vh[:rank]
    return x + torch.cat([x - mean, torch.ones(ROWS, 1, dtype=x.dtype)], dim=1) @ B @ V.T @ V


@pytest.mark.parametrize("rank", [1, 3, WIDTH])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_the_affine_solution_is_dense_reduced_rank_regression(rows, rank, ridge):
    x = rows[0]
    W1, W2, b = Regression(streamed(*rows), ridge).affine(rank)
    edited = x + (x @ W1.mT + b.unsqueeze(1)) @ W2
    torch.testing.assert_close(edited[0], dense(*rows, rank, ridge), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(W2[0] @ W2[0].T, torch.eye(rank, dtype=torch.float64))


def test_without_ridge_directions_in_which_nothing_varies_take_no_part(rows):
    x, y, weights = rows
    x = torch.cat([x[..., :-1], torch.full_like(x[..., -1:], 5.0)], dim=-1)
    W1, _, b = Regression(streamed(x, y, weights), 0.0).affine(WIDTH)
    assert W1.isfinite().all() and b.isfinite().all()
    assert W1[..., -1].abs().max() < 1e-9


def test_each_rank_gains_what_the_solution_says(rows):
    x = rows[0]
    regression = Regression(streamed(*rows), 0.0)
    before = distance(*rows, x)
    for rank in range(1, WIDTH + 1):
        W1, W2, b = regression.affine(rank)
        after = distance(*rows, x + (x @ W1.mT + b.unsqueeze(1)) @ W2)
        expected = regression.affine_gains()[0, :rank].sum()
        torch.testing.assert_close(before - after, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "form", ["nodireft", "noreft", "direft", "loreft", "consreft", "lobireft", "constant"]
)
def test_no_small_change_of_a_solved_edit_is_better(rows, form):
    x, y, weights = (t.float() for t in rows)
    regression = Regression(streamed(*rows), 0.0)
    function = build_function(form, WIDTH, 2)
    solved = type(function).solved if form in ("nodireft", "noreft", "constant") else None
    solved = solved or type(function).__mro__[1].solved
    tensors = {n: t.squeeze(0).float() for n, t in solved(regression, 2).items()}
    function.load(tensors)
    best = distance(x, y, weights, function(x))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = build_function(form, WIDTH, 2)
        other.load(
            {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        )
        assert distance(x, y, weights, other(x)) >= best - 1e-4
    assert best < distance(x, y, weights, x)


def test_cross_validation_is_cautious_with_few_rows_and_close_with_many(rows):
    generator = torch.Generator().manual_seed(2)
    few = [t[:, :9] for t in rows]
    noise = torch.randn(1, 9, WIDTH, dtype=torch.float64, generator=generator)
    nothing = Regression(streamed(few[0], noise, few[2]))
    fitted = Regression(streamed(few[0], noise, few[2]), 1e-5)
    # there is nothing to learn but the mean, which is not shrunk
    assert nothing.affine(WIDTH)[0].norm() < 0.1 * fitted.affine(WIDTH)[0].norm()
    many = Regression(streamed(*rows)).affine(WIDTH)
    close = Regression(streamed(*rows), 1e-5).affine(WIDTH)
    assert (many[0] - close[0]).norm() < 0.1 * close[0].norm()


def test_moments_do_not_depend_on_the_batches(rows):
    whole, parts = Moments.of(*rows), streamed(*rows, batch=5)
    for name, tensor in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), tensor, rtol=1e-10, atol=1e-10)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0.01, 100), max_size=6)), min_size=1),
    st.integers(1, 60),
)
def test_a_budget_is_never_exceeded_and_nothing_that_fits_is_left(places, budget):
    costs = {index: cost for index, (cost, _) in enumerate(places)}
    gains = {i: sorted(own, reverse=True) for i, (_, own) in enumerate(places)}
    ranks = allocate(gains, costs, budget)
    spent = sum(costs[i] * rank for i, rank in ranks.items())
    assert spent <= budget
    for index, rank in ranks.items():
        assert rank == len(gains[index]) or costs[index] > budget - spent


def test_at_equal_costs_no_other_choice_gains_more():
    gains = {"a": [5.0, 4.0, 0.1], "b": [3.0, 2.9], "c": [6.0, 0.2]}
    ranks = allocate(gains, dict.fromkeys(gains, 2), 9)
    gained = sum(sum(gains[place][:rank]) for place, rank in ranks.items())
    others = itertools.product(range(4), range(3), range(3))
    best = max(
        sum(sum(gains[p][:r]) for p, r in zip(gains, o, strict=True))
        for o in others
        if 2 * sum(o) <= 9
    )
    assert gained == best == 18.0


# -- through an encoder ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    return {
        task: TensorDataset(
            torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(index))
        )
        for index, task in enumerate(TASKS)
    }


@pytest.fixture(scope="module")
def experts():
    return fine_tuned(hf_tower)


def solved_model(experts, datasets, sites=None, tower=hf_tower, tasks=TASKS, **options):
    model = InterventionModel(tower(), tasks, sites or {"block": BLOCK})
    of = {task: experts[task] for task in tasks}
    return model, solve(model, of, datasets, **options)


def bias(model, experts, datasets, task):
    """Mean squared distance of the image features to the expert's."""
    (images,) = datasets[task].tensors
    with torch.no_grad():
        wanted = experts[task]().features(images)
        return (model.encode(images, task) - wanted).square().mean().item()


@pytest.mark.parametrize("tower", [hf_tower, dinov2_tower])
@pytest.mark.parametrize(
    "sites",
    [
        {"block": BLOCK},
        {"mlp": BLOCK | {"function": "noreft"}},
        {"attention": BLOCK | {"function": "loreft"}},
        {"attention": BLOCK, "mlp": BLOCK | {"function": "direft"}, "block": BLOCK},
        {"output": {"function": "nodireft", "init": "regression", "rank": 2}},
        {"block": BLOCK | {"function": "consreft"}},
        {"block": BLOCK | {"function": "lobireft"}},
        {"block": BLOCK | {"tokens": [0, 3, 5]}},
        {"block": BLOCK | {"tokens": "class", "blocks": [0, 2]}},
        {"block": BLOCK | {"share_tokens": False}},
        {"block": BLOCK | {"part": [4, 12]}},
        {"block": BLOCK | {"part": {"size": 24, "shift": True}}},
    ],
    ids=lambda sites: "+".join(f"{s}-{c['function']}" for s, c in sites.items()),
)
def test_every_site_form_and_placement_comes_closer_to_the_expert(datasets, sites, tower):
    experts = fine_tuned(tower)
    model, _ = solved_model(experts, datasets, sites, tower)
    merged = InterventionModel(tower(), TASKS, {"attention": {"init": "identity"}})
    for task in TASKS:
        assert bias(model, experts, datasets, task) < bias(merged, experts, datasets, task)


def test_the_towers_of_both_families_get_the_same_edits(experts, datasets):
    ours, _ = solved_model(experts, datasets)
    theirs, _ = solved_model(fine_tuned(openclip_tower), datasets, tower=openclip_tower)
    (images,) = datasets["ants"].tensors
    with torch.no_grad():
        one, other = ours.encode(images, "ants"), theirs.encode(images, "ants")
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", [hf_tower, dinov2_tower, dinov2_patches_tower])
def test_at_full_rank_the_states_of_an_image_are_met(datasets, tower):
    """With fewer rows than the width an edit interpolates: the states are the expert's."""
    pixels = datasets["ants"].tensors[0][:1]
    model, _ = solved_model(
        fine_tuned(tower),
        {"ants": TensorDataset(pixels)},
        {"block": BLOCK | {"rank": 32}},
        tower,
        tasks=["ants"],
        ridge=1e-5,
    )
    expert = fine_tuned(tower)["ants"]()
    with torch.no_grad(), model.for_task("ants"):
        ours, theirs = model.tower.embed(pixels), expert.embed(pixels)
        for block in range(3):
            ours, theirs = model.tower.run_block(block, ours), expert.run_block(block, theirs)
            # behind the last block most readouts read the class token alone
            everything = block < 2 or model.tower.reads_patches
            read = slice(None) if everything else slice(0, 1)
            torch.testing.assert_close(ours[:, read], theirs[:, read], rtol=1e-3, atol=1e-3)


def test_solving_together_equals_solving_one_by_one(experts, datasets):
    together, _ = solved_model(experts, datasets)
    for task in TASKS:
        alone, _ = solved_model(experts, datasets, tasks=[task])
        for name, tensor in alone.edits_of(task).state_dict().items():
            assert torch.equal(tensor, together.edits_of(task).state_dict()[name])


def test_states_on_disk_give_the_same_bits_as_states_in_memory(experts, datasets, monkeypatch):
    monkeypatch.setattr(sweep.Sweep, "_batch_size", 7)  # several batches
    memory, first = solved_model(experts, datasets)
    disk, second = solved_model(experts, datasets, cache_gb=1e-6)
    for name, tensor in memory.edits.state_dict().items():
        assert torch.equal(tensor, disk.edits.state_dict()[name])
    for task in TASKS:
        assert torch.equal(first.expert_features[task], second.expert_features[task])


def test_the_expert_features_are_the_experts(experts, datasets):
    _, solution = solved_model(experts, datasets)
    for task in TASKS:
        (images,) = datasets[task].tensors
        with torch.no_grad():
            wanted = experts[task]().features(images[solution.images[task]])
        torch.testing.assert_close(solution.expert_features[task], wanted, rtol=1e-4, atol=1e-5)


# -- budgets and unequal ranks ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_out(experts, datasets):
    return solved_model(experts, datasets, budget=5 * 65)


def test_a_budget_gives_unequal_ranks_and_is_not_exceeded(shared_out):
    model, solution = shared_out
    ranks = [r for of in model.ranks().values() for r in of["block"].values()]
    assert sum(ranks) == 5 and len(ranks) < 3 * len(TASKS)
    assert model.extra_parameters()["total"] == 5 * 65
    # the first ranks went where the first ranks gain most
    firsts = [g[0] for of in solution.gains.values() for g in of.values() if g]
    assert max(firsts) == max(
        solution.gains[t]["block", int(b)][0]
        for t, of in model.ranks().items()
        for b in of["block"]
    )


def test_a_budget_of_a_rank_is_what_that_rank_takes_everywhere(experts, datasets):
    at_rank_2, _ = solved_model(experts, datasets, {"block": BLOCK | {"rank": 2}})
    model, _ = solved_model(experts, datasets, budget="rank_2")
    allowed = at_rank_2.extra_parameters()["total"]
    assert allowed - 65 < model.extra_parameters()["total"] <= allowed
    assert len({r for of in model.ranks().values() for r in of["block"].values()}) > 1


@pytest.mark.parametrize("fold", [False, True])
def test_a_mixed_batch_of_unequal_ranks_equals_one_task_at_a_time(shared_out, datasets, fold):
    model = shared_out[0].fold() if fold else shared_out[0]
    (images,) = datasets["ants"].tensors
    mixed = [TASKS[i % 3] for i in range(12)]
    grouped = [task for task in TASKS for _ in range(4)]
    with torch.no_grad():
        for tasks in (mixed, grouped):
            together = model.encode(images[:12], task=tasks)
            for task in TASKS:
                rows = [i for i, name in enumerate(tasks) if name == task]
                alone = model.encode(images[rows], task=task)
                torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-5)


def test_unequal_ranks_are_saved_and_loaded(shared_out, datasets, tmp_path):
    model, _ = shared_out
    model.save_pretrained(tmp_path / "saved")
    loaded = InterventionModel.from_pretrained(tmp_path / "saved")
    assert loaded.ranks() == model.ranks()
    (images,) = datasets["bees"].tensors
    with torch.no_grad():
        assert torch.equal(loaded.encode(images, "bees"), model.encode(images, "bees"))


def test_a_mixed_batch_without_any_edit_is_the_merged_encoders(datasets):
    model = InterventionModel(hf_tower(), TASKS, {"block": BLOCK})
    (images,) = datasets["ants"].tensors
    with torch.no_grad():
        merged = model.encode(images)
        assert torch.equal(model.encode(images, [TASKS[i % 3] for i in range(24)]), merged)
        assert torch.equal(model.encode(images, "ants"), merged)


# -- what is refused, and what is kept -------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"block": BLOCK | {"function": "surgery"}}, "surgery has no closed solution"),
        ({"block": BLOCK | {"activation": "relu"}}, "nodireft with relu has no closed solution"),
        ({"block": BLOCK | {"init": "identity"}}, "no site's init is regression"),
    ],
)
def test_what_has_no_closed_solution_says_so(sites, message):
    model = InterventionModel(hf_tower(), TASKS, sites)
    with pytest.raises(ConfigError, match=message):
        solved_places(model)


def test_a_budget_that_buys_nothing_is_refused_before_an_image_is_read(experts):
    class Unreadable(list):
        __getitem__ = None

    with pytest.raises(ConfigError, match="budget: 64 parameters are below the cost of one rank"):
        solved_model(experts, {task: Unreadable([0]) for task in TASKS}, budget=64)


@pytest.mark.parametrize("budget", [None, 5 * 65])
def test_a_stopped_run_goes_on_from_the_last_finished_task(experts, datasets, tmp_path, budget):
    undisturbed, whole = solved_model(experts, datasets, budget=budget)
    loads = []

    def loading(task, stop_at):
        def load():
            loads.append(task)
            if len(loads) == stop_at:
                raise KeyboardInterrupt
            return experts[task]()

        return load

    kept = {"states": RunFolder(tmp_path / "states", "this"), "budget": budget}
    stop_at = 2 if budget is None else 5  # in the second task of the last sweep
    with pytest.raises(KeyboardInterrupt, match="solving; 1 of 3 tasks are solved; the same comm"):
        solved_model({t: loading(t, stop_at) for t in TASKS}, datasets, **kept)
    loads.clear()
    model, again = solved_model({t: loading(t, 99) for t in TASKS}, datasets, **kept)
    assert loads == TASKS[1:]
    for name, tensor in undisturbed.edits.state_dict().items():
        assert torch.equal(model.edits.state_dict()[name], tensor)
    assert again.gains == whole.gains
    other, _ = solved_model(
        experts, datasets, **(kept | {"states": RunFolder(tmp_path / "states", "other")})
    )
    assert other.ranks() == undisturbed.ranks()
    again.states.clear()
    assert not list(tmp_path.iterdir())


def test_a_task_without_edits_beside_others_that_are_refined(experts, datasets, monkeypatch):
    model, _ = solved_model(experts, datasets, budget=65)
    without = [task for task, sites in model.ranks().items() if not sites["block"]]
    assert len(without) == 2
    monkeypatch.setattr(loop._Trainer, "_groups", lambda self, images: [[t] for t in self.tasks])
    before = {name: tensor.clone() for name, tensor in model.edits.state_dict().items()}
    done = distill(model, experts, datasets, steps=2, batch_size=4)
    assert done.losses.isfinite().all() and done.losses.shape == (2, 3)
    assert all(not torch.equal(before[n], t) for n, t in model.edits.state_dict().items())


def test_edits_that_were_never_solved_cannot_be_trained(experts, datasets):
    model = InterventionModel(hf_tower(), TASKS, {"block": BLOCK})
    with pytest.raises(ConfigError, match="there are no edits to train"):
        distill(model, experts, datasets, steps=1, batch_size=4)


def broken():
    tower = hf_tower()
    next(iter(tower.mergeable().values())).data.flatten()[0] = torch.nan
    return tower


@pytest.mark.parametrize(
    ("expert", "problem"),
    [(openclip_tower, "experts of one architecture"), (broken, "not finite; allowed: finite")],
)
def test_an_expert_that_does_not_fit_is_named(experts, datasets, expert, problem):
    match = rf"modelpool\.models\.bees: .* {problem}"
    with pytest.raises(ConfigError, match=match):
        solved_model(experts | {"bees": expert}, datasets)
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(ConfigError, match=match):
        distill(model, experts | {"bees": expert}, datasets, steps=1, batch_size=2)
