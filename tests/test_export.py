"""Graphs for elsewhere: the model's numbers, without this package and without torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TASKS, blocks, hf_tower, openclip_tower, perturbed, relative
from test_clip import make_repaired
from test_model import EVERYWHERE, SETTINGS
from torch.nn import functional as F

from fusion_bench_intervmerge.cli import main
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.deploy.export import export, plain_encoder
from fusion_bench_intervmerge.encoders import tower_from_spec
from fusion_bench_intervmerge.interventions.functions import Function, build_function
from fusion_bench_intervmerge.model.model import InterventionModel

INDICES = torch.tensor([0, 2, 1, 1, 0, 2, 2, 2, 0, 1, 0, 1])
MIXED = [TASKS[index] for index in INDICES]
BLOCKS = {"attention": {}, "mlp": {"tokens": [0, 3, 5], "part": [[0, 3], [9, 12]]}}
SETTINGS = [*SETTINGS, {"mlp": {**BLOCKS["mlp"], "function": "consreft", "rank": 2}}]


@pytest.fixture(params=[hf_tower, openclip_tower], ids=["huggingface", "openclip"])
def make_tower(request):
    return request.param  # the families that a graph is known for


@pytest.fixture
def model():
    return perturbed(InterventionModel(hf_tower(), TASKS, EVERYWHERE))


@pytest.fixture
def heads():
    torch.manual_seed(1)
    return {task: torch.randn(3 + index, 16) for index, task in enumerate(TASKS)}


# -- plain modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("sites", SETTINGS)
def test_plain_modules_give_what_the_model_gives(make_tower, images, sites):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))
    with torch.no_grad():
        for made in (model, model.fold()):
            (features,) = plain_encoder(made)(images, INDICES)
            assert relative(features, model.encode(images, MIXED)) < 1e-5


def test_the_model_is_left_as_it_was(make_tower, images):
    model = perturbed(InterventionModel(make_tower(), TASKS, EVERYWHERE))
    with torch.no_grad():
        before = model.encode(images, MIXED)
        plain_encoder(model, dtype=torch.float16)
        assert torch.equal(model.encode(images, MIXED), before)


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        *((f, None) for f in ("noreft", "loreft", "direft", "consreft", "lobireft", "surgery")),
        *((f, "gelu") for f in ("noreft", "loreft", "direft")),
    ],
)
def test_tasks_may_differ_in_rank_and_lack_edits(function, activation, images):
    settings = {"function": function, "activation": activation}
    model = InterventionModel(hf_tower(), TASKS, {"attention": settings, "output": settings})
    for rank, task in enumerate(TASKS, start=2):
        wider = build_function(function, 32, rank, activation=activation)
        model.edits[task]["attention"]["1"] = wider
    model = perturbed(model)
    del model.edits["bees"]["attention"]["2"]
    for task in TASKS:  # no edit of any task here
        del model.edits[task]["attention"]["0"]
    (features,) = plain_encoder(model)(images, INDICES)
    for index, task in enumerate(TASKS):
        own = images[index == INDICES]
        with torch.no_grad():
            wanted = model.encode(own, task)
        assert relative(features[index == INDICES], wanted) < 1e-5


def test_a_form_of_ones_own(images):
    class Twice(Function):
        name = "twice"

        def reset_parameters(self, generator, identity):
            self.a = torch.nn.Parameter(torch.ones(self.rank))

        def edit(self, z, a):
            return z * a.sum(-1)[:, None, None]

    model = InterventionModel(hf_tower(), TASKS, {"attention": {"function": "twice"}})
    with torch.no_grad():
        (features,) = plain_encoder(model)(images, INDICES)
        assert relative(features, model.encode(images, MIXED)) < 1e-5


def test_logits_are_of_each_images_own_task(model, images, heads):
    with torch.no_grad():
        features, logits = plain_encoder(model, heads=heads)(images, INDICES)
    assert logits.shape == (12, 5)
    for row, feature, task in zip(logits, features, MIXED, strict=True):
        own = heads[task] @ F.normalize(feature, dim=0)
        torch.testing.assert_close(row[: len(own)], own)
        assert (row[len(own) :] == float("-inf")).all()


# -- files -------------------------------------------------------------------------------------

# A fresh process in which importing this package (and for ONNX torch) fails.
ALONE = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {gone}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Gone())
import numpy
given = numpy.load("given.npz")
{run}
numpy.savez("got.npz", features=features, logits=logits)
"""
RUN = {
    "onnx": (
        ["torch", "transformers", "fusion_bench_intervmerge"],
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession('model')\n"
        "features, logits = session.run(['image_features', 'logits'], dict(given))",
    ),
    "torch": (
        ["fusion_bench_intervmerge", "transformers"],
        "import torch\n"
        "model = torch.export.load('model').module()\n"
        "tensors = [torch.from_numpy(given[name]) for name in ('pixel_values', 'task')]\n"
        "features, logits = (tensor.numpy() for tensor in model(*tensors))",
    ),
}


def run_alone(to, file, images, indices, folder):
    file.rename(folder / "model")
    np.savez(folder / "given.npz", pixel_values=images.numpy(), task=indices.numpy())
    gone, code = RUN[to]
    subprocess.run(
        [sys.executable, "-c", ALONE.format(gone=gone, run=code)], cwd=folder, check=True
    )
    got = np.load(folder / "got.npz")
    return torch.from_numpy(got["features"]), torch.from_numpy(got["logits"])


@pytest.mark.parametrize("to", RUN)
def test_a_file_runs_where_this_package_is_not(to, model, images, heads, tmp_path):
    order = ["cats", "ants"]
    model.metadata["preprocessor"] = {"image_mean": [0.5, 0.5, 0.5]}
    classes = {"ants": ["red", "black"], "wasps": ["mud"]}
    settings = {"tasks": order, "fold": True, "heads": heads, "classes": classes}
    file = export(model, tmp_path / "m" / "file", to, **settings)
    if to == "onnx":
        check_what_it_says(onnxruntime.InferenceSession(str(file)))
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()

    indices = torch.tensor([0, 1, 1, 0, 0, 1, 0])  # more images than it was traced with
    tasks = [order[index] for index in indices]
    features, logits = run_alone(to, file, images[:7], indices, tmp_path)
    with torch.no_grad():
        wanted = model.encode(images[:7], tasks)
    assert relative(features, wanted) < 1e-4
    heads_apart = [heads[t] @ F.normalize(f, dim=0) for t, f in zip(tasks, wanted, strict=True)]
    assert logits.argmax(dim=1).tolist() == [int(head.argmax()) for head in heads_apart]


def check_what_it_says(session):
    said = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in said.items()} == {
        "tasks": ["cats", "ants"],
        "classes": {"ants": ["red", "black"]},
        "preprocessor": {"image_mean": [0.5, 0.5, 0.5]},
    }
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("pixel_values", ["batch", 3, 32, 32]),
        ("task", ["batch"]),
    ]
    one = {"pixel_values": np.zeros((1, 3, 32, 32), np.float32), "task": np.array([1])}
    features, logits = session.run(["image_features", "logits"], one)
    assert features.shape == (1, 16) and logits.shape == (1, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 5e-3), ("int8", 3e-2)])
def test_smaller_weights(dtype, tolerance, images, tmp_path):
    model = perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {}}))
    file = export(model, tmp_path / "model.onnx", dtype=dtype)
    given = {"pixel_values": images.numpy(), "task": INDICES.numpy()}
    (features,) = onnxruntime.InferenceSession(str(file)).run(None, given)
    with torch.no_grad():
        wanted = model.encode(images, MIXED)
    assert features.dtype == np.float32
    assert 1e-5 < relative(torch.from_numpy(features), wanted) < tolerance
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert ("MatMulNBits" in kinds) == (dtype == "int8")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "tflite"}, "to: unknown: 'tflite'; allowed: onnx, torch"),
        ({"dtype": "int4"}, "dtype: unknown: 'int4'; allowed: fp32, fp16, int8"),
        ({"to": "torch", "dtype": "int8"}, "dtype: int8 is onnxruntime's"),
        ({"tasks": ["wasps"]}, "tasks: the model has no task 'wasps'; allowed: ants, bees, cats"),
        ({"tasks": ["ants", "ants"]}, "tasks: a task is named twice"),
        ({"tasks": []}, "tasks: there is no task to export"),
        ({"heads": {"ants": torch.ones(2, 16)}}, "classes: there are none for task 'bees'"),
    ],
)
def test_what_cannot_be_exported(settings, said, model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        export(model, tmp_path / "m" / "file", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "value"), [("layer_norm_eps", 1e-6), ("hidden_act", "relu")])
def test_an_encoder_that_the_graph_would_not_match(key, value, tmp_path):
    spec = hf_tower().spec()
    tower = tower_from_spec(spec | {"vision_config": {**spec["vision_config"], key: value}})
    with pytest.raises(ConfigError, match=f"model: {key} .* has no counterpart"):
        plain_encoder(InterventionModel(tower, TASKS, {"attention": {}}))


def test_more_than_a_file_can_hold(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_bench_intervmerge.export.files.MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="more than the 2 GiB of an ONNX file"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "dtype"), [("onnx", "fp32"), ("onnxscript", "fp32"), ("onnxruntime", "int8")]
)
def test_a_package_that_is_not_installed(package, dtype, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    # the graph is not made first: what is missing is said at once
    monkeypatch.setattr("fusion_bench_intervmerge.export.files._graph", lambda encoder: 1 / 0)
    model = InterventionModel(hf_tower(), TASKS, {"attention": {}})
    with pytest.raises(ConfigError, match=rf"to: {package}.* is not installed; .*\[export\]'"):
        export(model, tmp_path / "model.onnx", dtype=dtype)
    assert not list(tmp_path.iterdir())


# -- the command -------------------------------------------------------------------------------


def test_the_command_writes_beside_the_folder(images, tmp_path, capsys):
    model = perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {}}))
    model.save_pretrained(tmp_path / "saved")
    command = ["export", str(tmp_path / "saved"), "--to", "torch", "--tasks", "cats", "--fold"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'saved.pt2'}: 0.") and "MB, fp32" in shown
    assert shown.endswith("task: 0 cats\n")
    graph = torch.export.load(tmp_path / "saved.pt2").module()
    with torch.no_grad():
        (features,) = graph(images, torch.zeros(12, dtype=torch.long))
        assert relative(features, model.encode(images, "cats")) < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{nowhere}"], "no artifact here"),
        (["{saved}", "--logits"], "classes: none are known for task 'ants'"),
        (["{saved}", "--classes", "{nowhere}"], "not readable as JSON"),
        (["{saved}", "--classes", "{list}"], "not of this form"),
        (["{saved}", "--classes", "{classes}"], "clip: the model does not say which CLIP"),
        (["{saved}", "--classes", "{classes}", "--clip", "{nowhere}"], "is not found"),
    ],
)
def test_bad_input_gets_one_line(words, said, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "list").write_text("[]")
    described = {"names": ["yes", "no"], "templates": ["{}"]}
    (tmp_path / "classes").write_text(json.dumps(dict.fromkeys(TASKS, described)))
    paths = {name: tmp_path / name for name in ("saved", "nowhere", "list", "classes")}
    assert main(["export", *(word.format(**paths) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes", "list", "saved"]


# -- docs/export.md ----------------------------------------------------------------------------


def test_what_the_page_shows_runs(tmp_path, monkeypatch, capsys):
    # one block: exporters take their time for each
    make_repaired(1).save_pretrained(tmp_path / "outputs" / "first" / "intervmerge")
    monkeypatch.chdir(tmp_path)
    for line in blocks("export.md")[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0
    capsys.readouterr()
    names = {}
    for block in blocks("export.md", "python"):
        exec(block, names)
    assert len(capsys.readouterr().out.split()) == 2  # a shape and a digit
    assert names["tasks"] == ["digits", "shapes"] and names["features"].shape[0] == 2
    assert (tmp_path / "model.pt2").exists()
