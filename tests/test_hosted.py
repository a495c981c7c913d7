"""Task-conditional models among FusionBench's vision models."""

from __future__ import annotations

import pytest
import torch
from commands import compose, only
from conftest import TASKS, hf_tower, openclip_tower, perturbed
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.utils import instantiate
from torch import nn
from torch.nn.functional import normalize

from fusion_bench_intervmerge.fusion.hosted import (
    HostedInterventionModel,
    HostedModel,
    by_task,
    encode_mixed,
    mark_unseen,
)
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.model.protocols import TaskConditionalModel

SITES = {"attention": {"rank": 2}, "output": {"function": "surgery", "rank": 3}}


def hosted(make=hf_tower):
    return perturbed(HostedInterventionModel(make(), TASKS, SITES))


def as_the_host_does(model, images, projection, task):
    """``HFCLIPClassifier.forward``: the pass, projection, norm, and only then the task."""
    output = model(images)
    embeds = projection(output if isinstance(output, torch.Tensor) else output[1])
    embeds = embeds / embeds.norm(p=2, dim=-1, keepdim=True)
    return embeds, model.compute_surgery_features(embeds, dataset_name=task)


@torch.no_grad()
def test_the_hosts_protocol_gives_the_tasks_features(images):
    model = hosted()
    embeds, (edited, merged, difference) = as_the_host_does(
        model, images, model.tower.projection, "bees"
    )
    torch.testing.assert_close(edited, normalize(model.encode(images, "bees"), dim=-1))
    assert merged is embeds and torch.equal(difference, embeds - edited)
    torch.testing.assert_close(embeds, normalize(model.encode(images), dim=-1))


@torch.no_grad()
def test_without_a_task_the_output_is_the_merged_encoders(images):
    output, plain = hosted()(pixel_values=images), hf_tower().model(images)
    assert torch.equal(output.pooler_output, plain.pooler_output)
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state)


@torch.no_grad()
def test_features_of_no_known_images_are_refused(images):
    model, buffer = hosted(), images.clone()
    embeds = model.tower.projection(model(buffer)[1])
    buffer.zero_()  # the next batch
    edited, _, _ = model.compute_surgery_features(embeds, "ants")
    torch.testing.assert_close(edited, normalize(model.encode(images, "ants"), dim=-1))
    model(images)
    with pytest.raises(ValueError, match="not those of the last forward pass"):
        model.compute_surgery_features(embeds[:3], "ants")
    with pytest.raises(ValueError, match="not those of the last forward pass"):
        model.compute_surgery_features(embeds, "ants")  # the images were those of the call before


@torch.no_grad()
def test_a_task_that_the_model_does_not_know_gets_the_merged_features(images):
    model = hosted()
    _, (features, merged, _) = as_the_host_does(model, images, model.tower.projection, "dogs")
    torch.testing.assert_close(features, merged)
    one = by_task(model)
    one.task = "dogs"
    assert torch.equal(one(images), model.encode(images))
    report = {"dogs": {}, "ants": {}, "average": {}}
    assert mark_unseen(report, model) == report | {"dogs": {"unseen": True}}
    tasks = ["dogs", "ants"] * (len(images) // 2)
    mixed = encode_mixed(model, images, tasks)
    torch.testing.assert_close(mixed[::2], model.encode(images)[::2])
    torch.testing.assert_close(mixed[1::2], model.encode(images, "ants")[1::2])
    with pytest.raises(ValueError, match="no edits for task 'dogs'"):
        model.encode(images, "dogs")


@torch.no_grad()
def test_where_no_task_is_ever_named_the_model_refuses(images):
    model = hosted(openclip_tower)
    with pytest.raises(ValueError, match="this task pool never names one"):
        model(images)
    assert torch.equal(model(images, task="ants"), model.encode(images, "ants"))


class EncoderPerTask(nn.Module):
    """As little as the protocol asks for."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({t: hf_tower(s, 0.1) for s, t in enumerate(TASKS, 1)})

    @property
    def tasks(self):
        return list(self.encoders)

    def encode(self, images, task=None):
        return self.encoders[task].features(images)

    def extra_parameters(self):
        return {"total": 0}


@torch.no_grad()
def test_any_task_conditional_model_can_be_hosted(images):
    model = EncoderPerTask()
    assert isinstance(model, TaskConditionalModel)
    host = HostedModel(model, like=hf_tower())
    assert host(images).isnan().all() and host.tasks == TASKS
    _, (features, _, _) = as_the_host_does(host, images, hf_tower().projection, "cats")
    assert torch.equal(features, normalize(model.encode(images, "cats"), dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("make", [hosted, EncoderPerTask])
def test_our_task_pools_name_the_task_before(images, make):
    model = make()
    one = by_task(model)
    with pytest.raises(ValueError, match="no task is named"):
        one(images)
    for one.task in TASKS:
        assert torch.equal(one(images), model.encode(images, one.task))
    assert not hasattr(one, "is_surgery_model")


@torch.no_grad()
def test_outside_of_fusionbench_a_forward_pass_wants_a_task(images):
    model = perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {}}))
    with pytest.raises(ValueError, match="no task is named"):
        model(images)
    with model.for_task(None):
        assert torch.equal(model(images).pooler_output, hf_tower().model(images).pooler_output)


def test_captions_are_encoded_once_for_all_models_of_a_run(monkeypatch):
    """FusionBench's own pool encodes them for each model, and gives the same report."""
    config = compose(*only("digits", "positions"))
    models, encoded = instantiate(config.modelpool), []
    encode = HFCLIPClassifier.set_classification_task

    def counted(self, classnames, templates):
        encoded.append(len(classnames))
        encode(self, classnames, templates)

    monkeypatch.setattr(HFCLIPClassifier, "set_classification_task", counted)
    reports = []
    for target in (config.taskpool._target_, "fusion_bench.taskpool.CLIPVisionModelTaskPool"):
        pool = instantiate({**config.taskpool, "_target_": target}, _recursive_=False)
        reports.append([pool.evaluate(models.load_model(name)) for name in models.model_names])
    assert reports[0] == reports[1] and reports[0][0] != reports[0][1]
    assert len(encoded) == 2 + 4
