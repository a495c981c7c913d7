"""Routers: told apart, in one pass, saved, and tasks that come and go."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import TASKS, hf_tower, openclip_tower, perturbed
from safetensors.torch import load_file, save_file

from fusion_bench_intervmerge.config import ArtifactError, ConfigError
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.model.router import RouterSettings, rows_of
from fusion_bench_intervmerge.solving.fit_router import fit_router

SITES = {
    "class token": {"attention": {"rank": 2}},
    "all tokens": {"block": {"rank": 2, "tokens": "all"}},
    "later": {"attention": {"rank": 2, "blocks": [1, 2]}, "mlp": {"tokens": "all", "blocks": [2]}},
    "last block": {"attention": {"rank": 2, "blocks": [2]}},
    "output": {"output": {"function": "surgery", "rank": 3}},
}


def pictures(task: str, count: int = 24, seed: int = 0) -> torch.Tensor:
    """Noise whose mean, contrast and grain are the task's."""
    place = [*TASKS, "dogs"].index(task)
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(9 * seed + place))
    return noise * (0.3, 1.0, 0.3, 2.0)[place] + (0.0, -1.0, 1.0, 3.0)[place]


def fitted(sites=None, settings=None, make=hf_tower, tasks=TASKS):
    model = perturbed(InterventionModel(make(), tasks, sites or SITES["class token"]))
    fit_router(model, {task: pictures(task) for task in tasks}, settings)
    return model


def mixed(seed: int = 1) -> tuple[torch.Tensor, list[str]]:
    """Images of all tasks that no router was fitted on, and their tasks."""
    images = torch.stack([pictures(task, 4, seed) for task in TASKS], dim=1).flatten(0, 1)
    return images, TASKS * 4


@pytest.mark.parametrize("sites", SITES)
def test_tasks_that_look_different_are_told_apart(sites):
    images, tasks = mixed()
    told = fitted(SITES[sites]).route(images)
    assert sum(one == other for one, other in zip(told, tasks, strict=True)) >= 11


@torch.no_grad()
@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("make", [hf_tower, openclip_tower])
def test_routed_is_the_same_as_told_in_one_pass(sites, make):
    images, tasks = mixed()
    model, worked = fitted(SITES[sites], make=make), []
    for block in range(3):
        module = model.tower.tap("mlp", block)
        module.register_forward_hook(lambda *given: worked.append(given[2].numel()))
    routed = model.encode(images, "auto")
    # of the first edited block the class token may be taken once more, without its edits
    assert sum(worked) <= (3 * 17 + 1) * 32 * len(images)
    torch.testing.assert_close(routed, model.encode(images, tasks), rtol=1e-5, atol=1e-5)
    assert (routed - model.encode(images)).abs().max() > 0.01


@torch.no_grad()
def test_where_edits_begin_later_the_embedding_is_read_as_well():
    images, _ = mixed()
    tower = hf_tower()
    model = InterventionModel(tower, TASKS, {"block": {"tokens": "all", "blocks": [2]}})
    embedded = tower.embed(images)
    entered = tower.run_block(1, tower.run_block(0, embedded))
    rows = [rows_of(states, tower.num_tokens) for states in (embedded, entered)]
    assert torch.equal(model.router_rows(images), torch.cat(rows, dim=1))
    model = InterventionModel(tower, TASKS, {"block": {"tokens": "all"}})
    assert torch.equal(model.router_rows(images), rows[0])


def test_both_families_route_alike():
    images, _ = mixed()
    images += torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    models = [fitted(make=make) for make in (hf_tower, openclip_tower)]
    assert models[0].route(images) == models[1].route(images)


def test_without_a_router():
    model = InterventionModel(hf_tower(), TASKS, SITES["class token"])
    for ask in (model.route, lambda images: model.encode(images, "auto")):
        with pytest.raises(ValueError, match=r"has no router .*; fit_router\(model, images\)"):
            ask(mixed()[0])


# -- tasks that come and go ------------------------------------------------------------------------


def test_what_is_kept_of_a_task_is_its_own():
    images, tasks = mixed()
    model = fitted(tasks=TASKS[:2])
    before = copy.deepcopy(model.router.by_task)
    model.add_task("cats")
    assert set(model.route(images)) <= {"ants", "bees"}  # it does not know the new one yet
    fit_router(model, {"cats": pictures("cats")})
    assert model.route(images) == tasks
    for task, kept in before.items():
        assert all(torch.equal(kept[n], t) for n, t in model.router.by_task[task].items())
    model.drop_task("cats")
    assert {n: list(k) for n, k in model.router.by_task.items()} == {
        n: list(k) for n, k in before.items()
    }
    known = [task != "cats" for task in tasks]
    assert model.route(images[known]) == [task for task in tasks if task != "cats"]


def test_folding_keeps_the_router():
    images, tasks = mixed()
    model = fitted()
    folded = model.fold()
    folded.drop_task("ants")
    assert model.route(images) == tasks and "ants" not in folded.route(images)


def test_the_router_counts_apart_from_the_edits():
    model = fitted(settings={"dims": 8})
    extra = model.extra_parameters()
    rows = 6 * 32  # the class token, its attention output, and four numbers over the patches
    of_a_task = 1 + 8 + 8 * 9 // 2 + 51
    assert extra["router"] == rows + 8 * rows + 3 * of_a_task
    model.router = None
    assert model.extra_parameters() == {k: v for k, v in extra.items() if k != "router"}


# -- images of no known task -----------------------------------------------------------------------


@torch.no_grad()
def test_images_of_no_known_task_are_refused():
    images, tasks = mixed()
    model = fitted(settings={"threshold": 0.0})
    strange = pictures("dogs", 6)
    told = model.route(torch.cat([images, strange]))
    assert told[-6:] == [None] * 6
    assert sum(t == right for t, right in zip(told, tasks, strict=False)) >= 9
    features = model.encode(torch.cat([images, strange]), "auto")
    torch.testing.assert_close(features[-6:], model.encode(strange), rtol=1e-5, atol=1e-5)
    for index, task in enumerate(told[:12]):
        alone = model.encode(images[index : index + 1], task)
        torch.testing.assert_close(features[index : index + 1], alone, rtol=1e-5, atol=1e-5)
    model.router.threshold = None
    assert None not in model.route(strange)


@torch.no_grad()
def test_a_threshold_refuses_about_its_share_of_a_tasks_own_images():
    model = InterventionModel(hf_tower(), TASKS, SITES["class token"])
    fit_router(model, {t: pictures(t, 100) for t in TASKS}, {"threshold": 0.25, "dims": 8})
    told = [model.route(pictures(task, 200, seed=3)) for task in TASKS]
    refused = sum(names.count(None) for names in told) / 600
    assert 0.1 < refused < 0.45


# -- as files --------------------------------------------------------------------------------------


def test_a_saved_router_routes_as_it_did(tmp_path):
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = fitted(settings={"dims": 12, "threshold": 0.03})
    model.router.threshold = 0.02
    model.save_pretrained(tmp_path / "model")
    again = InterventionModel.from_pretrained(tmp_path / "model")
    assert again.router.config() == model.router.config()
    assert again.router.settings.dims == 12 and again.router.threshold == 0.02
    assert again.route(images) == model.route(images)
    saved, kept = again.router.tensors(), model.router.tensors()
    assert saved.keys() == kept.keys() and all(torch.equal(saved[n], kept[n]) for n in kept)
    assert again.router.tasks == model.router.tasks


def test_a_model_without_a_router_is_saved_as_before(tmp_path):
    model = InterventionModel(hf_tower(), TASKS, SITES["class token"])
    model.save_pretrained(tmp_path / "model")
    assert "router" not in (tmp_path / "model" / "config.json").read_text()
    assert InterventionModel.from_pretrained(tmp_path / "model").router is None


def test_elsewhere_without_fusionbench(tmp_path):
    model = fitted(SITES["all tokens"])
    images, tasks = mixed()
    model.save_pretrained(tmp_path / "model")
    save_file({"images": images}, tmp_path / "images.safetensors")
    script = (
        "import sys; sys.modules['fusion_bench'] = None\n"
        "from safetensors.torch import load_file\n"
        "from fusion_bench_intervmerge import InterventionModel\n"
        "model = InterventionModel.from_pretrained('model')\n"
        "print(*model.route(load_file('images.safetensors')['images']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == tasks


def spoilt(change):
    """A saved model whose router is changed, its digests right."""
    import json

    from fusion_bench_intervmerge.model import artifact

    def write(folder):
        fitted(settings={"dims": 8}).save_pretrained(folder)
        file = folder / "router.safetensors"
        tensors, config = load_file(file), json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, file)
        config["files"]["router.safetensors"] = artifact._digest(file.read_bytes())
        config.pop("digest")
        config["digest"] = artifact._digest_of_config(config)
        (folder / "config.json").write_text(json.dumps(config))

    return write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: t.pop("reading.mean"), "the router lacks reading.mean"),
        (lambda t, c: t.update({"reading.mean": torch.zeros(3)}), "has misshapen reading.mean"),
        (lambda t, c: t.update({"tasks.dogs.mean": torch.zeros(3)}), "has unknown tasks.dogs.mean"),
        (lambda t, c: t.pop("tasks.bees.mean"), "lacks tasks.bees.mean"),
        (lambda t, c: t["tasks.bees.mean"].fill_(torch.nan), "tasks.bees.mean has numbers"),
        (lambda t, c: c["router"].update(treshold=1), "treshold: no such setting"),
        (
            lambda t, c: t.update(
                {"reading.mean": torch.zeros(9), "reading.directions": torch.zeros(9, 8)}
            ),
            "reads 9 numbers per image, the encoder gives 192",
        ),
    ],
)
def test_a_router_that_does_not_fit_is_refused_in_one_line(change, said, tmp_path):
    spoilt(change)(tmp_path / "model")
    with pytest.raises(ArtifactError, match=said) as error:
        InterventionModel.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("oracle", "router.name: 'oracle'; allowed: gaussian"),
        (5, "router: 5; allowed: a mapping"),
        ({"threshold": 2.0}, "router.threshold: 2.0; allowed: null, or a number in [0, 0.5]"),
        ({"treshold": 0.1}, "router.treshold: no such setting, did you mean threshold?"),
    ],
)
def test_a_setting_that_does_not_fit(settings, said):
    with pytest.raises(ConfigError) as error:
        fitted(settings=settings)
    assert str(error.value).startswith(said)


def test_images_that_do_not_fit():
    model = InterventionModel(hf_tower(), TASKS, SITES["class token"])
    with pytest.raises(ConfigError, match=r"router\.images: task 'ants' has 1; allowed: 2 or more"):
        fit_router(model, {"ants": pictures("ants", 1)})
    with pytest.raises(ConfigError, match="router: there are no images"):
        fit_router(model, {})
    with pytest.raises(ValueError, match="no edits for task 'dogs'"):
        fit_router(model, {"dogs": pictures("dogs")})
    assert model.router is None


def test_few_images_and_equal_ones_are_enough():
    images = {task: torch.full((3, 3, 32, 32), float(i)) for i, task in enumerate(TASKS)}
    model = InterventionModel(hf_tower(), TASKS, SITES["class token"])
    fit_router(model, images, RouterSettings())
    assert len(model.route(images["ants"])) == 3
