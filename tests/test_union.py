"""One stream of all tasks' images in one label space, and the router that a run fits for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import ROOT, compose, evaluating, in_process
from conftest import hf_tower
from fusion_bench.utils import instantiate
from PIL import Image
from torch import nn

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.fusion.host import OneLineError
from fusion_bench_intervmerge.fusion.union import Corrupted, Stream, StreamSettings, measure
from fusion_bench_intervmerge.model.model import InterventionModel

UNIONS = sorted(p.stem for p in (ROOT / "config" / "taskpool").glob("[!_]*_union.yaml"))
CPU = torch.device("cpu")
THREE = ["digits", "counting", "gratings"]

# Features are the images themselves: two classes of task ``a``, then three of ``b``.
HEADS = {"a": lambda x: x[:, :2], "b": lambda x: x[:, 2:]}


def one_hot(*classes: int) -> torch.Tensor:
    return torch.eye(5)[list(classes)]


class Routed(nn.Module):
    """Features are the images, whatever the task; the router's answers are given."""

    def __init__(self, answers=None):
        super().__init__()
        self.answers, self.router = answers, None if answers is None else object()

    tasks = ("a", "b")

    def encode(self, images, task=None):
        return images

    def route(self, images):
        return self.answers[: len(images)]

    def extra_parameters(self):
        return {"total": 0}


def batch(classes, of, labels):
    return iter([(one_hot(*classes), torch.tensor(of), torch.tensor(labels))])


def test_what_counts_as_right():
    # images of class 0 of a; 1 of a, that looks like 4; 0 of b; 2 of b; 2 of b
    stream = [0, 4, 2, 4, 4], [0, 0, 1, 1, 1], [0, 1, 0, 2, 2]
    report = measure(Routed(["a", "b", "a", "b", None]), HEADS, batch(*stream), CPU)
    assert report["a"]["given"] == 0.5 and report["b"]["given"] == 1
    assert report["a"]["routed"] == 0.5  # the second was taken for b
    assert report["b"]["routed"] == pytest.approx(1 / 3)  # one taken for a, one refused
    assert report["a"]["union"] == 0.5 and report["b"]["union"] == 1
    assert report["a"]["routing"] == 0.5 and report["b"]["routing"] == pytest.approx(1 / 3)
    assert report["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"a": 1, "b": 1, "none": 1}}
    assert report["average"]["given"] == 0.75
    assert [report["a"]["accuracy"], report["b"]["accuracy"]] == [0.5, pytest.approx(1 / 3)]


def test_a_model_that_asks_for_no_task_is_told_none():
    report = measure(lambda x: x, HEADS, batch([0, 4, 2], [0, 0, 1], [0, 1, 0]), CPU)
    assert report["average"] == {"accuracy": 0.75, "union": 0.75, "routing": 0.75}
    assert report["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"b": 1}}


def test_a_model_without_a_router_has_the_number_of_the_task_given():
    report = measure(Routed(), HEADS, batch([0, 4, 2], [0, 0, 1], [0, 1, 0]), CPU)
    assert report["average"] == {"accuracy": 0.75, "given": 0.75} and "confusion" not in report


def test_a_task_that_was_not_seen_has_no_number():
    report = measure(lambda x: x, HEADS, batch([2], [1], [0]), CPU)
    assert set(report) == {"b", "average", "confusion"} and report["average"]["union"] == 1


def test_the_stream_holds_every_image_once_in_mixed_order():
    data = {task: [(torch.zeros(1), i) for i in range(20)] for task in ("a", "b")}
    stream = Stream(data, seed=0)
    items = [(of, label) for _, of, label in (stream[i] for i in range(len(stream)))]
    assert sorted(items) == [(of, i) for of in (0, 1) for i in range(20)]
    assert 4 < sum(of for of, _ in items[:20]) < 16
    assert stream.keys == Stream(data, seed=0).keys != Stream(data, seed=1).keys


# -- corrupted images ------------------------------------------------------------------------------


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(64, 192, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("corruption", ["noise", "blur"])
def test_corrupted_images_are_the_same_every_time(corruption):
    data = [{"image": picture(), "label": 3}, (picture(), 4)]
    distances = []
    for severity in range(1, 6):
        settings = StreamSettings(corruption=corruption, severity=severity)
        spoilt = Corrupted(data, "a", settings)
        first, second = spoilt[0], spoilt[1]
        assert (first["label"], second["label"], len(spoilt)) == (3, 4, 2)
        assert np.array_equal(first["image"], Corrupted(data, "a", settings)[0]["image"])
        away = np.asarray(first["image"], float) - np.asarray(data[0]["image"], float)
        distances.append(np.abs(away).mean())
        same = np.array_equal(first["image"], second["image"])
        assert same == (corruption == "blur")  # noise is each image's own
    assert distances == sorted(distances) and distances[0] > 1


# -- the configs -----------------------------------------------------------------------------------


def test_every_named_pool_has_its_stream():
    named = {p.stem for p in (ROOT / "config" / "taskpool").glob("*.yaml")} - set(UNIONS)
    named -= {"own", "published"}  # of whatever tasks the model pool has
    assert {f"{name}_union" for name in named if not name.startswith("_")} == set(UNIONS)


@pytest.mark.parametrize("name", ["clip-vit-b32_TALL14_union", "openclip-vit-tiny_TA8_union"])
def test_the_stream_is_of_the_pools_own_tasks(name):
    union = compose("taskpool.corruption=noise", config=f"taskpool/{name}").taskpool
    plain = compose(config=f"taskpool/{name.removesuffix('_union')}").taskpool
    assert union.test_datasets == plain.test_datasets
    family = "OpenCLIP" if name.startswith("openclip") else "CLIP"
    assert union._target_.endswith(f".Union{family}VisionModelTaskPool")
    assert (union.corruption, union.severity) == ("noise", 3)


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("clip", "corruption=rain", "taskpool.corruption: 'rain'; allowed: null, noise, blur"),
        ("clip", "severity=6", "taskpool.severity: 6; allowed: a whole number, 1 to 5"),
        ("openclip", "stream_seed=-1", "taskpool.stream_seed: -1; allowed"),
    ],
)
def test_a_setting_that_does_not_fit(family, override, message):
    config = compose(f"taskpool.{override}", config=f"taskpool/{family}-vit-tiny_TA8_union")
    with pytest.raises(ConfigError) as error:
        instantiate(config.taskpool, _recursive_=False)
    assert str(error.value).startswith(message)


def test_both_families_give_one_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reports = []
    for family in ("clip", "openclip"):
        name = f"{family}-vit-tiny_TA8"
        more = ["taskpool.corruption=noise", "+taskpool.fast_dev_run=true"]
        config = compose(f"modelpool={name}", f"taskpool={name}_union", *more, *evaluating(*THREE))
        pool = instantiate(config.modelpool)
        task_pool = instantiate(config.taskpool, _recursive_=False)
        reports.append(task_pool.evaluate(pool.load_model("digits")))
    assert sum(sum(row.values()) for row in reports[0]["confusion"].values()) == 128
    for report in reports:
        del report["model_info"]
    assert reports[0] == reports[1]


# -- a run -----------------------------------------------------------------------------------------

FEW = ["method.data.images=24", "method.data.split=validation"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("union")
    in_process(
        "method=intervmerge/routed",
        *FEW,
        "method.save_to='{log_dir}/model'",
        "modelpool=clip-vit-tiny_TA8",
        "modelpool.tasks=[digits,counting,gratings]",
        "taskpool=clip-vit-tiny_TA8_union",
        *evaluating(*THREE),
        "taskpool.dataloader_kwargs.batch_size=360",
        "fast_dev_run=true",
        folder=folder,
    )
    return folder / "log"


def test_a_run_fits_its_router_and_tells_the_honest_numbers(run):
    report = json.loads((run / "program_report.json").read_text())
    average = report["average"]
    assert average["routing"] > 0.8 and average["accuracy"] == average["routed"]
    assert average["given"] >= average["routed"] > 0.3
    about = json.loads((run / "intervmerge.json").read_text())["models"]
    (result,) = about.values()
    assert result["settings"]["router"]["name"] == "gaussian" and result["base"] == "calibration"
    assert "routing" in result["seconds_by_part"]
    model = InterventionModel.from_pretrained(run / "model")
    assert model.router.tasks == ["digits", "counting", "gratings"] == model.tasks
    assert model.placements["block"].blocks == [3, 4, 5]


def test_the_merge_and_the_calibration_are_evaluated_on_the_stream_too(run):
    references = json.loads((run / "reference_report.json").read_text())
    assert list(references) == ["pretrained", "task_arithmetic", "calibration"]
    accuracies = {name: report["average"]["union"] for name, report in references.items()}
    assert len({*accuracies.values()}) == 3
    assert all("routed" not in report["average"] for report in references.values())


@pytest.mark.parametrize("family", ["", "open"])
def test_without_a_router_too_and_a_finished_run_leaves_no_states(family, own_cache, tmp_path):
    in_process(
        "method=intervmerge/closed_form",
        *FEW,
        f"modelpool={family}clip-vit-tiny_TA8",
        f"taskpool={family}clip-vit-tiny_TA8_union",
        "modelpool.tasks=[digits,counting]",
        *evaluating("digits", "counting"),
        "fast_dev_run=true",
        folder=tmp_path,
    )
    references = json.loads((tmp_path / "log" / "reference_report.json").read_text())
    assert {*references} - {"pretrained"} == {"task_arithmetic"}
    assert references["task_arithmetic"]["average"].keys() == {"accuracy", "union", "routing"}
    assert not [*own_cache.rglob("state-*")]


def test_a_task_that_joins_is_routed_and_the_others_stay(run, tmp_path):
    in_process(
        "method=intervmerge/closed_form",
        *FEW,
        f"method.extend={run / 'model'}",
        "method.save_to='{log_dir}/more'",
        "modelpool=clip-vit-tiny_TA8",
        "modelpool.tasks=[gratings,positions]",
        folder=tmp_path,
    )
    before = InterventionModel.from_pretrained(run / "model").router
    after = InterventionModel.from_pretrained(tmp_path / "log" / "more").router
    assert after.tasks == [*before.tasks, "positions"]
    for name, tensor in before.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)


def test_no_router_joins_a_model_whose_images_are_gone(tmp_path):
    sites = {"block": {"function": "nodireft", "tokens": "all", "init": "regression"}}
    InterventionModel(hf_tower(), [], sites).save_pretrained(tmp_path / "model")
    with pytest.raises(OneLineError, match=r"router: .* has none, and its tasks' images"):
        in_process(
            "method=intervmerge/closed_form",
            *FEW,
            f"method.extend={tmp_path / 'model'}",
            "method.router=gaussian",
            "modelpool=clip-vit-tiny_TA8",
            folder=tmp_path,
        )
