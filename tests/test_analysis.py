"""Analyses say what their formulas say: closed forms on small encoders in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import TASKS, hf_tower, openclip_tower, perturbed
from torch import Tensor

from fusion_bench_intervmerge.analysis import ANALYSES, TaskEncoders, analyse, read_analyses
from fusion_bench_intervmerge.analysis.contributions import without_each
from fusion_bench_intervmerge.analysis.stitching import stitch
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.model.model import InterventionModel

TASK = TASKS[0]
EVERYWHERE = {
    "attention": {"function": "nodireft", "rank": 2},
    "mlp": {"function": "direft", "tokens": "patch", "blocks": [1]},
    "block": {"function": "direft", "tokens": "all", "blocks": [0, 2]},
    "output": {"function": "surgery", "rank": 3},
}
IDENTITY = {site: settings | {"init": "identity"} for site, settings in EVERYWHERE.items()}


def double(make, **kwargs):
    return make(**kwargs).double().eval()


def repaired(interventions, make=hf_tower):
    """A model in float64 whose edits change something."""
    return perturbed(InterventionModel(double(make), TASKS, interventions).double())


def encoders(models, make=hf_tower, images=40, labels=True) -> TaskEncoders:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    pixels = torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64)
    given_labels = torch.randint(5, (images,), generator=generator) if labels else None
    expert, merged = double(make, seed=1, noise=0.05), double(make)
    return TaskEncoders(TASK, pixels, expert, merged, models, lambda f: f @ head.T, given_labels)


@pytest.fixture(scope="module", params=[hf_tower, openclip_tower], ids=["huggingface", "openclip"])
def seen(request) -> TaskEncoders:
    """A task with a repaired model beside it."""
    return encoders({"model": repaired(EVERYWHERE, request.param)}, request.param)


# -- bias ------------------------------------------------------------------------------------------


def test_identity_edits_have_the_merged_encoders_bias_at_every_block() -> None:
    identity = InterventionModel(double(hf_tower), TASKS, IDENTITY).double()
    values = analyse(encoders({"identity": identity}), ["bias"])["bias"]
    assert len(values["merged"]["blocks"]) == 3
    assert values["identity"] == values["merged"]
    assert min(values["merged"]["blocks"]) > 0


def test_a_surgery_leaves_every_block_as_it_was() -> None:
    surgery = repaired({"output": {"function": "surgery", "rank": 3}})
    values = analyse(encoders({"surgery": surgery}), ["bias"])["bias"]
    assert values["surgery"]["blocks"] == values["merged"]["blocks"]
    assert values["surgery"]["features"] != values["merged"]["features"]


def test_bias_is_of_what_the_model_encodes(seen: TaskEncoders) -> None:
    model = seen.models["model"]
    with torch.no_grad():
        own, expert = model.encode(seen.images, TASK), seen.expert.features(seen.images)
        assert seen.trace("merged").features.allclose(model.encode(seen.images))
    values = analyse(seen, ["bias"])["bias"]["model"]["features"]
    assert values == pytest.approx(float((own - expert).abs().mean()))


# -- agreement -------------------------------------------------------------------------------------


def test_the_expert_agrees_with_itself(seen: TaskEncoders) -> None:
    assert seen.scores(seen.trace("expert").features)["agreement"] == 1


def test_agreement_is_what_one_counts(seen: TaskEncoders) -> None:
    assert seen.logits is not None
    own, expert = (seen.logits(seen.trace(n).features).argmax(1) for n in ("model", "expert"))
    counted = sum(int(a == b) for a, b in zip(own, expert, strict=True)) / len(own)
    assert analyse(seen, ["agreement"])["agreement"]["model"] == pytest.approx(counted)


# -- stitching -------------------------------------------------------------------------------------


def test_stitching_goes_from_the_expert_to_the_model(seen: TaskEncoders) -> None:
    cuts = stitch(seen, "model")
    assert len(cuts) == 4
    assert torch.equal(cuts[0], seen.trace("expert").features)
    assert torch.equal(cuts[-1], seen.trace("model").features)


def test_the_expert_stitched_to_itself_is_the_expert(seen: TaskEncoders) -> None:
    assert all(torch.equal(cut, seen.trace("expert").features) for cut in stitch(seen, "expert"))


def test_a_cut_is_the_first_blocks_of_one_and_the_last_of_the_other(seen: TaskEncoders) -> None:
    model, expert = seen.models["model"], seen.expert
    with torch.no_grad(), model.for_task(TASK):
        states = model.tower.run_block(0, model.tower.embed(seen.images))
        for block in (1, 2):
            states = expert.run_block(block, states)
        by_hand = expert.readout(states)
    assert stitch(seen, "model")[1].allclose(by_hand, atol=1e-12)


def test_without_labels_there_is_agreement_and_no_accuracy() -> None:
    blind = encoders({"model": repaired(EVERYWHERE)}, labels=False)
    values = analyse(blind, ["stitching", "contributions"])
    assert set(values["stitching"]["model"]) == {"agreement"}
    assert set(values["contributions"]["model"][0]) == {"site", "block", "bias", "agreement"}
    blind.logits = None
    assert set(analyse(blind, ["bias", "stitching", "agreement"])) == {"bias"}


# -- contributions ---------------------------------------------------------------------------------


def test_switching_an_identity_off_changes_nothing() -> None:
    identity = InterventionModel(double(hf_tower), TASKS, IDENTITY).double()
    values = analyse(encoders({"identity": identity}), ["contributions"])["contributions"][
        "identity"
    ]
    assert [(edit["site"], edit["block"]) for edit in values] == [
        ("attention", 0), ("block", 0), ("attention", 1), ("mlp", 1), ("attention", 2),
        ("block", 2), ("output", None),
    ]  # fmt: skip
    assert all(edit[k] == 0 for edit in values for k in ("bias", "agreement", "accuracy"))


def test_an_edit_switched_off_is_a_model_without_it(seen: TaskEncoders) -> None:
    model = seen.models["model"]
    for (site, block), features in without_each(seen, model).items():
        with torch.no_grad():
            with model.for_task(TASK, without=(site, block)):
                by_hand = model.tower.features(seen.images)
            whole = model.encode(seen.images, TASK)
        assert features.allclose(by_hand, atol=1e-12)
        assert not features.allclose(whole, atol=1e-6), (site, block)


def test_without_its_only_edit_a_model_is_the_merged_encoder() -> None:
    one = repaired({"attention": {"rank": 1, "blocks": [1]}})
    seen = encoders({"one": one})
    (features,) = without_each(seen, one).values()
    assert torch.equal(features, seen.trace("merged").features)
    values = analyse(seen, ["bias", "contributions"])
    (edit,) = values["contributions"]["one"]
    gained = values["bias"]["merged"]["features"] - values["bias"]["one"]["features"]
    assert edit["bias"] == pytest.approx(gained)


# -- embeddings ------------------------------------------------------------------------------------


def test_the_plane_holds_every_encoders_images_and_is_the_same_twice(seen: TaskEncoders) -> None:
    values, again = (analyse(seen, ["embeddings"])["embeddings"] for _ in range(2))
    assert list(values) == ["expert", "merged", "model"]
    assert all(len(cloud) == 40 for kinds in values.values() for cloud in kinds.values())
    assert values == again


def test_equal_encoders_fall_on_one_another() -> None:
    identity = InterventionModel(double(hf_tower), TASKS, IDENTITY).double()
    values = analyse(encoders({"identity": identity}), ["embeddings"])["embeddings"]
    assert values["identity"]["pca"] == values["merged"]["pca"]


# -- what is asked for -----------------------------------------------------------------------------


def test_each_image_is_encoded_once(seen: TaskEncoders) -> None:
    calls = []
    hook = seen.expert.output.register_forward_hook(lambda *_: calls.append(1))
    fresh = TaskEncoders(TASK, seen.images, seen.expert, seen.merged, seen.models, seen.logits)
    analyse(fresh, ["bias", "agreement", "embeddings"])
    hook.remove()
    assert len(calls) == 2  # 40 images, two batches


def test_analyses_are_named() -> None:
    assert read_analyses(None) == [] and read_analyses("all") == list(ANALYSES)
    assert read_analyses(["bias"]) == ["bias"] == read_analyses("bias")
    with pytest.raises(ConfigError, match="analyses: there is no analysis 'bais'; allowed: null"):
        read_analyses(["bais"])


def test_encoders_that_cannot_be_compared_are_one_line() -> None:
    model = repaired({"attention": {}})
    with pytest.raises(ConfigError, match="no repair can be called 'expert'"):
        encoders({"expert": model})
    expert = double(hf_tower)
    expert.projection_dim = 8
    with pytest.raises(ConfigError, match=r"modelpool\.models\.ants: it has 3 blocks"):
        TaskEncoders(TASK, torch.zeros(1, 3, 32, 32), expert, model.tower, {})


def test_half_precision_encoders_are_analysed() -> None:
    tower = hf_tower(dtype=torch.bfloat16)
    images = torch.randn(6, 3, 32, 32)
    head: Tensor = torch.randn(4, 16)
    seen = TaskEncoders(TASK, images, tower, tower, {}, lambda f: f @ head.T)
    values = analyse(seen, ["bias", "stitching", "embeddings"])
    assert values["bias"]["merged"]["features"] == 0
    assert values["stitching"]["merged"]["agreement"] == [1.0] * 4
