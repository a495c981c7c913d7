"""The merged encoder with per-task edits."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TASKS, acts, hf_tower, perturbed, relative
from open_clip.transformer import VisionTransformer
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.interventions.config import InterventionConfig
from fusion_bench_intervmerge.model.model import InterventionModel

EVERYWHERE = {
    "attention": {"rank": 2},
    "mlp": {"function": "loreft", "tokens": "patch", "share_tokens": False},
    "block": {"function": "direft", "tokens": [0, 3], "part": {"size": 12, "shift": True}},
    "output": {"function": "surgery", "rank": 3},
}
SETTINGS = [
    {"attention": {"rank": 2}},
    {"output": {"function": "surgery", "rank": 3}},
    {"block": {"function": "surgery", "tokens": "all"}, "output": {"function": "surgery"}},
    {"attention": {"function": "lobireft", "part": {"size": 8, "shift": True}, "blocks": [2]}},
    {"mlp": {"blocks": "last_2"}, "block": {"function": "nodireft", "blocks": [2]}},
    EVERYWHERE,
]


def intervmerge(golden, model):
    with torch.no_grad():
        for block in range(4):
            function = model.edits_of("a")[f"attention {block}"]
            init = {n: golden[f"encoder.init.block{block}.{n}"] for n in ("W1", "W2", "b", "b2")}
            function.W1.copy_(init["W1"])
            function.W2.copy_(init["W2"])
            function.b.copy_(init["b"] - init["b2"])
    return model


def surgery_v2(golden, model):
    with torch.no_grad():
        edits = model.edits_of("a")
        for name in ("down", "up"):
            getattr(edits["output 0"], name).copy_(golden[f"surgery_v2.init.output.{name}"])
            for block in range(4):
                tensor = getattr(edits[f"block {block}"], name)
                tensor.copy_(golden[f"surgery_v2.init.block{block}.{name}"])
    return model


def test_intervmerge_gives_the_published_features(golden, golden_tower):
    start = InterventionModel(golden_tower("merged"), ["a"], {"attention": {"rank": 3}})
    model = intervmerge(golden, start)
    with torch.no_grad():
        images = golden["encoder.images"][0]
        assert relative(model.encode(images, "a"), golden["encoder.features.intervened"]) < 1e-5
        assert relative(model.encode(images), golden["encoder.features.plain"]) < 1e-5
    assert acts(golden["encoder.features.plain"], golden["encoder.features.intervened"])


def test_surgery_v2_gives_the_published_features_and_block_means(golden, golden_tower):
    sites = {
        "output": {"function": "surgery", "rank": 3},
        "block": {"function": "surgery", "rank": 3, "tokens": "all"},
    }
    model = surgery_v2(golden, InterventionModel(golden_tower("merged"), ["a"], sites))
    means = []
    with torch.no_grad(), model.for_task("a"):
        states = model.tower.embed(golden["encoder.images"][0])
        features = model.tower.features_from(states, 0, lambda _, s: means.append(s.mean(dim=1)))
    assert relative(features, golden["surgery_v2.features"]) < 1e-5
    assert relative(torch.stack(means), golden["surgery_v2.block_means"]) < 1e-5


@pytest.mark.parametrize("sites", SETTINGS)
def test_without_a_task_it_is_the_merged_encoder_bit_for_bit(make_tower, images, sites):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))
    with torch.no_grad():
        assert torch.equal(model.encode(images), make_tower().features(images))
        assert not torch.equal(model.encode(images, "bees"), model.encode(images))


def test_identity_edits_change_no_bit(make_tower, images):
    sites = {site: {"init": "identity", **config} for site, config in EVERYWHERE.items()}
    model = InterventionModel(make_tower(), TASKS, sites)
    with torch.no_grad():
        assert torch.equal(model.encode(images, "ants"), make_tower().features(images))


@pytest.mark.parametrize("sites", SETTINGS)
def test_a_mixed_batch_equals_the_tasks_one_by_one(make_tower, images, sites):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))
    for names in (TASKS * 4, sorted(TASKS * 4), ["bees"] * 11 + ["ants"], ["cats"] * 12):
        with torch.no_grad():
            mixed = model.encode(images, names)
            alone = torch.cat(
                [model.encode(image[None], task) for image, task in zip(images, names, strict=True)]
            )
        assert relative(mixed, alone) < 1e-5


@pytest.mark.parametrize("sites", SETTINGS)
@pytest.mark.parametrize("names", [["bees"] * 12, TASKS * 4], ids=["one task", "mixed"])
def test_the_shortcuts_of_training_change_nothing(make_tower, images, sites, names):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))

    def features_and_gradients(features):
        model.edits.zero_grad()
        features.abs().mean().backward()
        gradients = [p.grad for p in model.edits.parameters() if p.grad is not None]
        return features.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    plain, plain_gradients = features_and_gradients(model.encode(images, names))
    prefix = model.prefix()
    with model.tower.cheap_to_train():
        start = prefix.of(images)
        with model.for_task(names):
            quick, gradients = features_and_gradients(prefix.features(start))
    assert relative(quick, plain) < 1e-5
    assert relative(gradients, plain_gradients) < 1e-4


def test_one_tasks_edits_never_change_another_tasks_features(images):
    model = InterventionModel(hf_tower(), TASKS, EVERYWHERE)
    with torch.no_grad():
        before = {task: model.encode(images, task) for task in TASKS}
        for parameter in model.edits_of("bees").parameters():
            parameter += 1
        assert torch.equal(model.encode(images, "ants"), before["ants"])
        assert torch.equal(model.encode(images, "cats"), before["cats"])
        assert not torch.equal(model.encode(images, "bees"), before["bees"])
        model.drop_task("bees")
        model.add_task("dogs")
        assert model.tasks == ["ants", "cats", "dogs"]
        assert torch.equal(model.encode(images, "cats"), before["cats"])
        with pytest.raises(ValueError, match="no edits for task 'bees'; the model has: ants"):
            model.encode(images, "bees")


def test_a_tasks_start_depends_on_its_name_and_the_seed_alone(images):
    one = InterventionModel(hf_tower(), ["bees"], EVERYWHERE)
    many = InterventionModel(hf_tower(), TASKS, EVERYWHERE)
    other = InterventionModel(hf_tower(), ["bees"], EVERYWHERE, seed=1)
    with torch.no_grad():
        assert torch.equal(one.encode(images, "bees"), many.encode(images, "bees"))
        assert not torch.equal(one.encode(images, "bees"), other.encode(images, "bees"))


@pytest.mark.parametrize("sites", SETTINGS)
def test_folding_changes_no_features(make_tower, images, sites):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))
    folded = model.fold()
    with torch.no_grad():
        # not to the bit: some releases of torch multiply by a parameter in another way
        assert relative(folded.encode(images, "ants"), model.encode(images, "ants")) < 1e-6
        assert relative(folded.encode(images, TASKS * 4), model.encode(images, TASKS * 4)) < 1e-6
    extra = model.extra_parameters()
    assert folded.extra_parameters()["total"] == extra["folded"] <= extra["total"]


# -- the parameter table of the paper ------------------------------------------------------------

B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}
L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
MINI = {"function": "lobireft", "part": {"size": 64, "shift": True}}


@pytest.fixture(scope="module")
def real_sizes():
    """ViT-B/32 and ViT-L/14 as configured by OpenAI; no weights are allocated."""
    with torch.device("meta"):
        b32 = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=12, **B32))
        l14 = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=24, **L14))
        towers = {
            "B/32": as_tower(b32, torch.nn.Linear(768, 512, bias=False)),
            "L/14": as_tower(l14, torch.nn.Linear(1024, 768, bias=False)),
            "B/32 OpenCLIP": as_tower(
                VisionTransformer(224, 32, 768, 12, 12, mlp_ratio=4.0, output_dim=512)
            ),
        }
    return towers


@pytest.mark.parametrize(
    ("size", "sites", "trained", "folded"),
    [
        ("B/32", {"output": {"function": "surgery", "rank": 16}}, 131_072, 131_072),
        ("B/32", {"output": {"function": "surgery", "rank": 64}}, 524_288, 524_288),
        ("B/32", {"attention": {"rank": 1}}, 147_552, 147_552),
        ("B/32", {"attention": {"rank": 4}}, 590_208, 590_208),
        ("B/32", {"attention": {"rank": 1, "blocks": "middle_1"}}, 12_296, 12_296),
        ("B/32", {"attention": MINI}, 6_240, 6_144),
        ("B/32", {"attention": MINI | {"part": {"size": 32, "shift": True}}}, 3_168, 3_072),
        ("B/32 OpenCLIP", {"attention": {"rank": 1}}, 147_552, 147_552),
        ("L/14", {"attention": {"rank": 1}}, 8 * 24 * (2 * 1024 + 1), 8 * 24 * (2 * 1024 + 1)),
        ("L/14", {"output": {"function": "surgery", "rank": 16}}, 8 * 2 * 768 * 16, 196_608),
    ],
)
def test_parameter_counts_are_the_papers(real_sizes, size, sites, trained, folded):
    model = InterventionModel(
        copy.deepcopy(real_sizes[size]), [f"task{i}" for i in range(8)], sites
    )
    extra = model.extra_parameters()
    assert (extra["total"], extra["folded"]) == (trained, folded)
    assert sum(extra["per_task"].values()) == trained


def test_a_named_task_is_applied_in_the_towers_own_forward_pass(images):
    model = perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {}}))
    with torch.no_grad():
        pooled = model(images, task="cats").pooler_output
        torch.testing.assert_close(model.tower.projection(pooled), model.encode(images, "cats"))
    behind = InterventionModel(hf_tower(), TASKS, EVERYWHERE)
    with pytest.raises(ValueError, match="after the visual projection"):
        behind(images, task="cats")


def test_a_copy_has_hooks_of_its_own(images):
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with torch.no_grad():
        before = model.encode(images, "ants")
        assert torch.equal(copy.deepcopy(model).encode(images, "ants"), before)
        other = perturbed(model)
        assert not torch.equal(other.encode(images, "ants"), before)
        assert torch.equal(model.encode(images, "ants"), before)


def test_a_shallow_copy_applies_the_edits_too(images):
    model = perturbed(InterventionModel(hf_tower(), TASKS, EVERYWHERE))
    shallow = copy.copy(model)
    with torch.no_grad():
        expected = {task: model.encode(images, task) for task in (None, *TASKS)}
        for task, features in expected.items():
            assert torch.equal(shallow.encode(images, task), features)
            assert torch.equal(copy.deepcopy(shallow).encode(images, task), features)


def test_a_model_run_inside_another_ones_forward_pass_keeps_its_own_task(images):
    outer = perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {}}))
    inner = InterventionModel(outer.tower, TASKS, {"mlp": {"rank": 2}})  # on the same tower
    with torch.no_grad():
        expected = outer.encode(images, "ants"), inner.encode(images, "bees")
        seen = []

        def encode_inside(*_):
            if not seen:
                seen.append(None)
                seen.append(copy.deepcopy(inner).encode(images, "bees"))

        outer.tower.block(1).register_forward_hook(encode_inside)
        assert torch.equal(outer.encode(images, "ants"), expected[0])
        assert torch.equal(seen[1], expected[1])
        with outer.for_task("ants"), inner.for_task(None), outer.for_task("cats"):
            pass
        assert not outer.task_is_known and not inner.task_is_known


def test_threads_do_not_see_each_others_task(images):
    model = perturbed(InterventionModel(hf_tower(), TASKS, EVERYWHERE))
    routes = [None, *TASKS, TASKS * 4, TASKS[::-1] * 4]

    def encode(route):
        with torch.no_grad():  # a thread's own, too
            return model.encode(images, route)

    expected = [encode(route) for route in routes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns within a forward pass
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(encode, routes * 40))
    finally:
        sys.setswitchinterval(interval)
    wrong = [not torch.equal(f, e) for f, e in zip(found, expected * 40, strict=True)]
    assert sum(wrong) == 0, f"{sum(wrong)} of {len(wrong)}"


GOOD_NAMES = ["cifar100", "rendered-sst2", "task 1", "class", "None", "Straße", "日本語", "x" * 64]
BAD_NAMES = [
    *("", " x", "x ", ".", "..", "a.b", "a/b", "a\\b", "../up", "/tmp/x", "~", "-rf", "a:b", "a*b"),
    *("a\nb", "a\0b", "\x1b[31m", "\u202egnp", "\ud800", "😀", "x" * 129),
    *("average", "model_info", "auto", "_merged_", 3, None, True),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_task_names(name):
    with pytest.raises(ConfigError, match="tasks") as error:
        InterventionModel(hf_tower(), ["mnist", name], {"output": InterventionConfig()})
    assert "\n" not in str(error.value)


def test_good_task_names():
    names = [*GOOD_NAMES, *names_in_fusion_bench()]
    model = InterventionModel(hf_tower(), names, {"output": {}})
    assert model.tasks == names and len(names) > 50


def names_in_fusion_bench():
    """The tasks of every pool in FusionBench's configs and in ours."""
    configs = pytest.importorskip("fusion_bench_config")
    folders = [Path(p) for p in configs.__path__] + [Path(__file__).parents[1] / "config"]
    names = set()
    for file in (file for folder in folders for file in folder.glob("modelpool/**/*.yaml")):
        pool = yaml.safe_load(file.read_text()) or {}
        for key in ("models", "train_datasets", "test_datasets"):
            if isinstance(pool.get(key), dict):
                names |= set(pool[key])
    assert {"sun397", "stanford-cars", "emnist_letters", "rendered-sst2"} <= names
    return sorted(name for name in names - set(GOOD_NAMES) if not name.startswith("_"))


def test_too_few_tasks_for_the_images(images):
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(ValueError, match="2 tasks are named for 12 images"):
        model.encode(images, ["ants", "bees"])
