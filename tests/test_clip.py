"""A repaired model as an ordinary CLIP, which stock pipelines take."""

from __future__ import annotations

import copy

import numpy as np
import open_clip
import pytest
import torch
from conftest import TASKS, hf_tower, openclip_tower, perturbed, relative
from PIL import Image
from test_model import EVERYWHERE, SETTINGS
from transformers import CLIPConfig, CLIPModel, pipeline

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.deploy.clip import image_processor, to_clip_model
from fusion_bench_intervmerge.deploy.heads import Classes, zero_shot_head
from fusion_bench_intervmerge.model.model import InterventionModel


def hf_clip(**vision):
    torch.manual_seed(4)
    tower = hf_tower()
    text = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPConfig(
        vision_config=tower.config.to_dict() | vision,
        text_config=text | {"num_hidden_layers": 1, "vocab_size": 99},
        projection_dim=16,
    )
    return CLIPModel(config).eval()


def whole_openclip(**vision):
    torch.manual_seed(4)
    sizes = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 4, "layers": 1}
    # four heads, as in the tower
    return open_clip.CLIP(16, sizes | {"head_width": 8} | vision, text, quick_gelu=True).eval()


FAMILIES = {"huggingface": (hf_tower, hf_clip), "openclip": (openclip_tower, whole_openclip)}


def features(clip, images):
    encode = getattr(clip, "get_image_features", None) or clip.encode_image
    with torch.no_grad():
        return encode(images)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sites", SETTINGS)
def test_its_image_features_are_the_tasks(family, sites, images):
    make_tower, make_clip = FAMILIES[family]
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))
    given = make_clip()
    before = copy.deepcopy(given.state_dict())
    clips = {task: to_clip_model(model, task, given) for task in TASKS[:2]}
    for task, clip in clips.items():
        with torch.no_grad():
            wanted = model.encode(images, task)
        assert relative(features(clip, images), wanted) < 1e-5
        assert relative(features(copy.deepcopy(clip), images), wanted) < 1e-5
        assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    with torch.no_grad():  # neither the model nor the CLIP that was given has changed
        assert relative(model.encode(images), model.tower.features(images)) == 0
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_a_copy_has_edits_of_its_own(images):
    model = perturbed(InterventionModel(hf_tower(), TASKS, EVERYWHERE))
    clip = to_clip_model(model, "ants", hf_clip())
    wanted = features(clip, images)
    other = copy.deepcopy(clip)
    for name, parameter in other.named_parameters():
        if ".edit." in name:
            parameter.data.zero_()
    assert torch.equal(features(clip, images), wanted)
    assert not torch.allclose(features(other, images), wanted)


def test_a_stock_checkpoint_would_lose_the_edits(tmp_path):
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(ConfigError, match="no place for the edits"):
        to_clip_model(model, "ants", hf_clip()).save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit(family, tmp_path):
    make_tower, make_clip = FAMILIES[family]
    model = InterventionModel(make_tower(), TASKS, {"attention": {}})
    with pytest.raises(ValueError, match="no edits for task 'wasps'"):
        to_clip_model(model, "wasps", make_clip())
    with pytest.raises(ConfigError, match="clip: the model does not say which CLIP"):
        to_clip_model(model, "ants")
    with pytest.raises(ConfigError, match=r"'.*/nowhere' is not found"):
        to_clip_model(model, "ants", tmp_path / "nowhere")
    (other,) = (clip for name, (_, clip) in FAMILIES.items() if name != family)
    with pytest.raises(ConfigError, match=f"has no place for a {family} encoder"):
        to_clip_model(model, "ants", other())
    smaller = {"num_hidden_layers": 2} if family == "huggingface" else {"layers": 2}
    with pytest.raises(ConfigError, match="clip: another encoder than the model's"):
        to_clip_model(model, "ants", make_clip(**smaller))


# -- the embedded pool -------------------------------------------------------------------------


def make_repaired(num_blocks=None):
    """Edits at random on the embedded CLIP itself, or on its first blocks."""
    from fusion_bench_intervmerge.encoders import as_tower
    from fusion_bench_intervmerge.tinyclip import ensure_pool
    from fusion_bench_intervmerge.tinyclip.tasks import TASKS as EMBEDDED

    base, tasks = str(ensure_pool() / "pretrained"), ["digits", "shapes"]
    clip = CLIPModel.from_pretrained(base)
    clip.vision_model.encoder.layers = clip.vision_model.encoder.layers[:num_blocks]
    clip.vision_model.config.num_hidden_layers = len(clip.vision_model.encoder.layers)
    tower = as_tower(clip)
    model = perturbed(InterventionModel(tower, tasks, {"attention": {"rank": 2}}))
    classes = {
        task: {"names": list(EMBEDDED[task].classnames), "templates": list(EMBEDDED[task].prompts)}
        for task in tasks
    }
    model.metadata = {"base_model": base, "classes": classes}
    return model


@pytest.fixture(scope="module")
def repaired():
    return make_repaired()


def test_the_pipeline_takes_it(repaired):
    from fusion_bench_intervmerge.fusion.embedded.pool import load_processor
    from fusion_bench_intervmerge.tinyclip.tasks import TASKS as EMBEDDED

    processor, shapes = load_processor(), EMBEDDED["shapes"]
    classify = pipeline(
        "zero-shot-image-classification",
        model=to_clip_model(repaired, "shapes"),  # its CLIP is in the metadata
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    images, _ = shapes.images(0, "test", 4)
    pictures = [Image.fromarray(image) for image in images]
    names, template = list(shapes.classnames), "a photo of a {}"
    said = classify(pictures, candidate_labels=names, hypothesis_template=template)

    clip = CLIPModel.from_pretrained(repaired.metadata["base_model"])
    captions = Classes(names=names, templates=[template]).captions()
    head = zero_shot_head(clip, processor.tokenizer, captions) * clip.logit_scale.exp()
    pixels = image_processor(repaired)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        encoded = torch.nn.functional.normalize(repaired.encode(pixels, "shapes"), dim=-1)
    shares = (encoded @ head.T).softmax(dim=-1)
    for entries, share in zip(said, shares, strict=True):
        by_name = {entry["label"]: entry["score"] for entry in entries}
        np.testing.assert_allclose([by_name[n] for n in names], share.detach().numpy(), atol=1e-5)


def test_the_heads_are_the_pools(repaired):
    from fusion_bench.utils import instantiate
    from test_command import compose

    from fusion_bench_intervmerge.fusion.pools import ExpertPool

    pool = ExpertPool(instantiate(compose("modelpool=clip-vit-tiny_TA8").modelpool))
    about = pool.about()
    assert about["base_model"] == repaired.metadata["base_model"]
    assert about["preprocessor"]["image_mean"] == [0.5] * 3 and set(about["classes"]) == set(
        pool.tasks
    )
    clip = CLIPModel.from_pretrained(about["base_model"])
    features = torch.randn(5, clip.config.projection_dim)
    for task, described in about["classes"].items():
        captions = Classes(**described).captions()
        head = zero_shot_head(clip, pool._processor().tokenizer, captions)
        own = torch.nn.functional.normalize(features, dim=-1) @ head.T
        torch.testing.assert_close(own, pool.head(task)(features))
