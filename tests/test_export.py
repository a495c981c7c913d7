"""Graphs for elsewhere: the model's numbers, without this package and without torch."""

from __future__ import annotations

import copy
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
from conftest import TASKS, blocks, dinov2_tower, hf_tower, openclip_tower, perturbed, relative
from test_clip import make_repaired
from test_model import SETTINGS
from torch.nn import functional as F

from fusion_bench_intervmerge.cli import main
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.deploy.export import Graph, export
from fusion_bench_intervmerge.interventions.functions import Function, build_function
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving.fit_router import fit_router

INDICES = torch.tensor([0, 2, 1, 1, 0, 2, 2, 2, 0, 1, 0, 1])
MIXED = [TASKS[index] for index in INDICES]
APART = {"tokens": [0, 3, 5], "part": [[0, 3], [9, 12]]}
SETTINGS = [*SETTINGS, {"mlp": APART | {"function": "consreft", "rank": 2}}]


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def model():
    return perturbed(InterventionModel(hf_tower(), TASKS, {"attention": {}}))


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(1)
    return {task: torch.randn(3 + index, 16) for index, task in enumerate(TASKS)}


@torch.no_grad()
def features_of(model, images):
    """What is traced, run as it is."""
    return Graph(copy.deepcopy(model), model.tasks)(images, INDICES)[0]


@torch.no_grad()
def encoded(model, images, tasks=MIXED):
    return model.encode(images, tasks)


# -- what is traced ----------------------------------------------------------------------------


@pytest.mark.parametrize("sites", SETTINGS)
def test_it_gives_what_the_model_gives(make_tower, sites, images):
    model = perturbed(InterventionModel(make_tower(), TASKS, sites))
    wanted = encoded(model, images)
    for form in (model, model.fold()):
        assert relative(features_of(form, images), wanted) < 1e-5
    assert torch.equal(encoded(model, images), wanted)  # the model is left as it was


def test_a_form_of_ones_own(images, own_forms):
    class Twice(Function):
        name = "twice"

        def reset_parameters(self, generator, identity):
            self.a = torch.nn.Parameter(torch.ones(self.rank))

        def edit(self, z, a):
            return z * a.sum(-1)[:, None, None]

    model = InterventionModel(hf_tower(), TASKS, {"attention": {"function": "twice"}})
    assert relative(features_of(model, images), encoded(model, images)) < 1e-5


FORMS = [(f, None) for f in ("noreft", "loreft", "direft", "consreft", "lobireft", "surgery")]
FORMS += [(f, "gelu") for f in ("noreft", "loreft", "direft")]


def unequal(make_tower, function="loreft", activation=None):
    """A model whose tasks differ in rank, and partly lack edits."""
    settings = {"function": function, "activation": activation}
    model = InterventionModel(make_tower(), TASKS, {"attention": settings, "output": settings})
    for rank, task in enumerate(TASKS, start=2):
        wider = build_function(function, 32, rank, activation=activation)
        model.edits_of(task)["attention 1"] = wider
    model = perturbed(model)
    del model.edits_of("bees")["attention 2"]
    for task in TASKS:  # no edit of any task here
        del model.edits_of(task)["attention 0"]
    return model


@pytest.mark.parametrize(("function", "activation"), FORMS)
def test_tasks_may_differ_in_rank_and_lack_edits(function, activation, images):
    model = unequal(hf_tower, function, activation)
    features = features_of(model, images)
    for index, task in enumerate(TASKS):
        own = index == INDICES
        assert relative(features[own], encoded(model, images[own], task)) < 1e-5


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
        "session = onnxruntime.InferenceSession({file!r})\n"
        "features, logits = session.run(['image_features', 'logits'], dict(given))",
    ),
    "torch": (
        ["fusion_bench_intervmerge", "transformers"],
        "import torch\n"
        "model = torch.export.load({file!r}).module()\n"
        "tensors = [torch.from_numpy(given[name]) for name in ('pixel_values', 'task')]\n"
        "features, logits = (tensor.numpy() for tensor in model(*tensors))",
    ),
}


@pytest.mark.parametrize(("to", "make_tower"), [("onnx", openclip_tower), ("torch", hf_tower)])
def test_a_file_runs_where_this_package_is_not(to, make_tower, images, heads, tmp_path):
    model, order = unequal(make_tower), ["cats", "ants"]
    model.metadata["preprocessor"] = {"image_mean": [0.5, 0.5, 0.5]}
    classes = {"ants": ["red", "black"], "wasps": ["mud"]}
    file = export(model, tmp_path / "m" / "it", to, tasks=order, heads=heads, classes=classes)
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()
    assert b"site-packages" not in file.read_bytes()

    # other numbers of images than it was traced with, and two indices that no task has
    task = torch.tensor([0, 1, 1, 0, 0, -1, 2])
    np.savez(tmp_path / "given.npz", pixel_values=images[:7].numpy(), task=task.numpy())
    gone, run = RUN[to]
    code = ALONE.format(gone=gone, run=run.format(file=str(file)))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    got = np.load(tmp_path / "got.npz")
    features, logits = torch.from_numpy(got["features"]), torch.from_numpy(got["logits"])

    tasks = [order[index] for index in task[:5]]
    wanted = encoded(model, images[:5], tasks)
    assert relative(features[:5], wanted) < 1e-4
    assert logits.shape == (7, 5)
    for row, feature, name in zip(logits, wanted, tasks, strict=False):
        own = heads[name] @ F.normalize(feature, dim=0)
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-4, atol=1e-4)
        assert (row[len(own) :] == float("-inf")).all()
    assert features[5:].isnan().all() and logits[5:].isnan().all()
    if to == "onnx":
        check_what_it_says(onnxruntime.InferenceSession(str(file)))


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


@pytest.mark.parametrize(
    ("make_tower", "dtype", "least", "most"),
    [
        (dinov2_tower, "fp32", 0, 1e-4),
        (hf_tower, "fp16", 1e-5, 5e-3),
        (hf_tower, "int8", 1e-5, 3e-2),
    ],
)
def test_other_families_and_smaller_weights(make_tower, dtype, least, most, images, tmp_path):
    model = perturbed(InterventionModel(make_tower(), TASKS, {"attention": {}, "block": APART}))
    file = export(model, tmp_path / "model.onnx", dtype=dtype)
    session = onnxruntime.InferenceSession(str(file))
    (features,) = session.run(None, {"pixel_values": images.numpy(), "task": INDICES.numpy()})
    assert features.dtype == np.float32
    assert least <= relative(torch.from_numpy(features), encoded(model, images)) < most
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert ("MatMulNBits" in kinds) == (dtype == "int8")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "tflite"}, "to: unknown: 'tflite'; allowed: onnx, torch"),
        ({"dtype": "int4"}, "dtype: unknown: 'int4'; allowed: fp32, fp16, int8"),
        ({"to": "torch", "dtype": "int8"}, "dtype: int8 is onnxruntime's"),
        ({"tasks": ["wasps"]}, "tasks: the model has no task 'wasps'; allowed: ants, bees, cats"),
        ({"tasks": []}, "tasks: there is no task to export"),
        ({"heads": {"ants": torch.ones(2, 16)}}, "classes: there are none for task 'bees'"),
    ],
)
def test_what_cannot_be_exported(settings, said, model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        export(model, tmp_path / "m" / "file", **settings)
    assert not list(tmp_path.iterdir())


def test_more_than_a_file_can_hold(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_bench_intervmerge.deploy.export.MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="more than the 2 GiB of an ONNX file"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "dtype"), [("onnx", "fp32"), ("onnxscript", "fp32"), ("onnxruntime", "int8")]
)
def test_a_package_that_is_not_installed(package, dtype, model, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    # the graph is not made first: what is missing is said at once
    monkeypatch.setattr("fusion_bench_intervmerge.deploy.export._traced", lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match=rf"to: {package}.* is not installed; .*\[export\]'"):
        export(model, tmp_path / "model.onnx", dtype=dtype)
    assert not list(tmp_path.iterdir())


# -- the command -------------------------------------------------------------------------------


def described(names=("yes", "no"), templates=("a {}",)):
    classes = {"names": list(names), "templates": list(templates)}
    return json.dumps({task: classes for task in TASKS})


@pytest.mark.parametrize(
    ("words", "classes", "said"),
    [
        (["{nowhere}"], "", "no artifact here"),
        (["{saved}", "--logits"], "", "classes.ants: none are known"),
        (["{saved}", "--classes", "{nowhere}"], "", "not readable as JSON"),
        (["{saved}", "--classes", "{classes}"], "[]", "not a mapping"),
        (["{saved}", "--classes", "{classes}"], described([]), "classes.ants.names: "),
        (["{saved}", "--classes", "{classes}"], described(), "clip: the model does not say which"),
        (["{saved}", "--classes", "{classes}", "--clip", "{nowhere}"], described(), "is not found"),
        *(
            (["{saved}", "--classes", "{classes}"], described(templates=[text]), "needs {} once")
            for text in ("a photo of {c}", "a {} and a {}")
        ),
    ],
)
def test_bad_input_gets_one_line(words, classes, said, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "classes").write_text(classes)
    paths = {name: tmp_path / name for name in ("saved", "nowhere", "classes")}
    assert main(["export", *(word.format(**paths) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes", "saved"]


# -- docs/deployment.md ----------------------------------------------------------------------------


def test_what_the_page_shows_runs(tmp_path, monkeypatch, capsys):
    # one block: exporters take their time for each
    model = make_repaired(1)
    fit_router(model, {task: torch.randn(40, 3, 32, 32) for task in model.tasks})
    model.save_pretrained(tmp_path / "outputs" / "first" / "intervmerge")
    monkeypatch.chdir(tmp_path)
    for line in blocks("deployment.md#Export")[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0
    out, err = capsys.readouterr()
    *_, size, tasks, router = out.splitlines()
    assert size.startswith(f"{tmp_path}/outputs/first/intervmerge.pt2: ") and "MB, fp32" in size
    assert tasks == "task: 0 digits, 1 shapes"
    assert router.startswith("The router is not in the file") and err == ""
    names = {}
    for block in blocks("deployment.md#Export", "python"):
        exec(block, names)
    assert len(capsys.readouterr().out.split()) == 2  # a shape and a digit
    assert names["tasks"] == ["digits", "shapes"] and names["features"].shape[0] == 2
    assert (tmp_path / "model.pt2").exists()
