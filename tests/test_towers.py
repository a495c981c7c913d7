"""Both families of towers behind one interface."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TASKS, dinov2_tower, fine_tuned, hf_tower, openclip_tower, perturbed, relative
from test_model import SETTINGS
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.distillation.loop import distill
from fusion_bench_intervmerge.encoders import as_tower, tower_from_spec
from fusion_bench_intervmerge.encoders.dinov2 import DINOv2Tower
from fusion_bench_intervmerge.interventions.sites import SITES, Site
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.model.prefix import Images, PastAttention, States
from fusion_bench_intervmerge.solving.solve import solved_places


def test_published_encoders(golden, golden_tower):
    with torch.no_grad():
        plain = golden_tower("merged").features(golden["encoder.images"][0])
        expert = golden_tower("expert").features(golden["encoder.images"].flatten(0, 1))
    assert relative(plain, golden["encoder.features.plain"]) < 1e-5
    assert relative(expert, golden["encoder.features.expert"].flatten(0, 1)) < 1e-5


def test_the_stages_are_the_librarys_own_forward_pass(images):
    own, openclip, dinov2 = hf_tower(), openclip_tower(), dinov2_tower()
    with torch.no_grad():
        expected = own.projection(own.model(images).pooler_output)
        assert torch.equal(own.features(images), expected)
        assert torch.equal(openclip.features(images), openclip.visual(images))
        assert torch.equal(dinov2.features(images), dinov2.model(images).pooler_output)
    assert dinov2.num_tokens == 1 + 2 + 16 and dinov2.prefix_tokens == 3


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_without_registers_at_another_image_size(swiglu):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Dinov2Model(
        Dinov2Config(**sizes, image_size=56, patch_size=14, use_swiglu_ffn=swiglu)
    ).eval()
    tower = DINOv2Tower(model, image_size=42)
    images = torch.randn(2, 3, 42, 42)
    again = tower_from_spec(tower.spec())
    again.load_weights(tower.weights())
    with torch.no_grad():
        assert torch.equal(again.features(images), model(images).pooler_output)
    assert tower.num_tokens == 1 + 9
    with pytest.raises(ValueError, match="images of 56 pixels, not 42"):
        tower.features(torch.randn(2, 3, 56, 56))


def test_what_a_dinov2_head_reads_are_its_towers_features(images):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 5}
    model = Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=32, patch_size=8)).eval()
    with torch.no_grad():
        logits = model.classifier(as_tower(model).features(images))
        assert torch.equal(logits, model(images).logits)


def test_a_dinov2_artifact_holds_what_transformers_reads(images, tmp_path):
    model = perturbed(InterventionModel(dinov2_tower(), TASKS, {"attention": {"rank": 2}}))
    model.save_pretrained(tmp_path / "saved")
    stock = AutoModel.from_pretrained(tmp_path / "saved" / "merged").eval()
    loaded = InterventionModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(stock(images).pooler_output, model.encode(images))
        assert torch.equal(loaded.encode(images, TASKS * 4), model.encode(images, TASKS * 4))


def test_the_same_weights_give_the_same_features_in_both_families(images):
    with torch.no_grad():
        ours, theirs = hf_tower().features(images), openclip_tower().features(images)
    assert relative(theirs, ours) < 1e-5


@pytest.mark.parametrize("make_tower", [hf_tower, openclip_tower])
def test_the_class_token_alone_goes_through_the_last_block_as_among_all(make_tower, images):
    tower = make_tower()
    last = tower.num_blocks - 1
    with torch.no_grad():
        states = tower.embed(images)
        for block in range(last):
            states = tower.run_block(block, states)
        alone = tower.finish(last, states[:, :1], tower.attend(last, states))
        among = tower.run_block(last, states)[:, :1]
    assert alone.shape == (12, 1, tower.width)
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-6)


def test_a_tower_is_rebuilt_from_its_spec_and_weights(make_tower, images):
    tower = make_tower(seed=1, noise=0.1)
    again = tower_from_spec(tower.spec())
    assert again.digest() != tower.digest()
    again.load_weights(tower.weights())
    assert again.digest() == tower.digest()
    with torch.no_grad():
        assert torch.equal(again.features(images), tower.features(images))


def test_weights_that_do_not_fit_are_named(make_tower):
    tower = make_tower()
    weights = tower.weights()
    name = next(iter(weights))
    without = {n: t for n, t in weights.items() if n != name}
    with pytest.raises(ValueError, match="lacks"):
        tower.load_weights(without)
    with pytest.raises(ValueError, match="misshapen"):
        tower.load_weights(weights | {name: torch.zeros(3)})


def test_weights_held_in_another_type_come_back_bit_for_bit(make_tower):
    tower = make_tower()
    digest = tower.digest()
    with tower.in_dtype(torch.bfloat16):
        assert tower.dtype == torch.bfloat16
    assert tower.digest() == digest


def test_a_whole_clip_model_is_taken_apart(images):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2} | {
        "image_size": 32,
        "patch_size": 8,
        "num_attention_heads": 4,
    }
    heads = {"num_attention_heads": 2, "vocab_size": 20}
    clip = CLIPModel(CLIPConfig(text_config=text | heads, vision_config=vision, projection_dim=8))
    clip = clip.eval()
    with torch.no_grad():
        expected = clip.get_image_features(images)
        expected = getattr(expected, "pooler_output", expected)  # of transformers 5
        assert torch.equal(as_tower(copy.deepcopy(clip)).features(images), expected)


def test_what_is_no_tower_is_refused():
    with pytest.raises(TypeError, match="no vision tower is known"):
        as_tower(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="visual projection"):
        as_tower(hf_tower().model)


# -- sites and shortcuts ---------------------------------------------------------------------------


def without_shortcuts(make):
    """The same towers, of a family that has run_block alone."""

    def build(*args, **kwargs):
        tower = make(*args, **kwargs)
        kind = type(tower)
        tower.__class__ = type("Plain", (kind,), {"shortcuts": frozenset(), "family": kind.family})
        return tower

    return build


@pytest.mark.parametrize("sites", SETTINGS[::3])
def test_a_tower_without_shortcuts_gives_the_same_numbers(make_tower, datasets, images, sites):
    found = []
    for make in (make_tower, without_shortcuts(make_tower)):
        model = InterventionModel(make(), TASKS, sites)
        done = distill(model, fine_tuned(make), datasets, steps=5, batch_size=4)
        with torch.no_grad():
            found.append((done.losses, model.encode(images, TASKS * 4)))
    for one, other in zip(*found, strict=True):
        assert relative(other, one) < 1e-4


@pytest.mark.parametrize("name", SITES)
def test_a_shortcut_passes_every_tap_that_its_tower_says(make_tower, images, name):
    """Where it passes no tap of a site, that site's edits would be skipped without a word."""
    tower, site = make_tower(), SITES[name]
    if not site.in_blocks or not tower.can_spare([name]):
        return
    states = tower.embed(images)
    with tower.watching(name, 1) as among, torch.no_grad():
        tower.run_block(1, states)
    with tower.watching(name, 1) as alone, torch.no_grad():
        tower.finish(1, states[:, :1], tower.attend(1, states))
    assert len(among) == len(alone) == 1
    torch.testing.assert_close(alone[0], among[0][:, :1], rtol=1e-5, atol=1e-6)


VALUE = Site(("self_attn.v_proj", "attn.out_proj"))


def test_a_site_that_no_shortcut_knows_is_not_skipped(monkeypatch, datasets, images):
    monkeypatch.setitem(SITES, "value", VALUE)
    model = InterventionModel(hf_tower(), TASKS, {"value": {"rank": 2, "blocks": "last_2"}})
    prefix = model.prefix()
    assert isinstance(prefix, States) and not isinstance(prefix, PastAttention)
    losses = distill(model, fine_tuned(hf_tower), datasets, steps=40, batch_size=4).losses
    assert losses[-4:].mean() < losses[:4].mean()
    start = prefix.of(images)
    with torch.no_grad(), model.for_task("bees"):
        whole = model.encode(images, "bees")
        assert relative(prefix.features(start), whole) < 1e-5
        assert relative(model.encode(images), whole) > 1e-3


def test_a_site_before_the_blocks(monkeypatch, datasets, images):
    paths = "model.vision_model.pre_layrnorm", "model.pre_layrnorm"  # of transformers 4 and 5
    monkeypatch.setitem(SITES, "embedding", Site(paths, at="start"))
    model = InterventionModel(hf_tower(), TASKS, {"embedding": {"tokens": "all"}})
    assert isinstance(model.prefix(), Images)
    losses = distill(model, fine_tuned(hf_tower), datasets, steps=12, batch_size=4).losses
    assert losses[-4:].mean() < losses[:4].mean()
    with pytest.raises(ConfigError, match="the site embedding has no blocks"):
        InterventionModel(hf_tower(), TASKS, {"embedding": {"blocks": [1]}})
    with pytest.raises(
        ConfigError, match="not solved in closed form; allowed: regression at attention"
    ):
        solved_places(InterventionModel(hf_tower(), TASKS, {"embedding": {"init": "regression"}}))


def test_a_site_that_an_encoder_does_not_have(monkeypatch):
    monkeypatch.setitem(SITES, "registers", Site(("register_tokens",)))
    with pytest.raises(ConfigError, match="huggingface encoders have no such site"):
        InterventionModel(hf_tower(), TASKS, {"registers": {}})
