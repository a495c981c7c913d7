"""The installed command, composed by Hydra for real, on the embedded pool."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.distillation import loop
from fusion_bench_intervmerge.files import CACHE_VARIABLE
from fusion_bench_intervmerge.model.model import InterventionModel

ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).with_name("fusion_bench"))
TINY = ["modelpool=clip-vit-tiny_TA8", "taskpool=clip-vit-tiny_TA8"]
QUIET = ["print_config=false", "print_function_call=false"]


def fusion_bench(*overrides, cwd, check=True, **environment):
    done = subprocess.run(
        [COMMAND, *overrides],
        cwd=cwd,
        # the same bits need the same number of threads, and the tests run on one
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The main job, short: base merge, repair, evaluation, a saved model."""
    folder = tmp_path_factory.mktemp("run")
    done = fusion_bench(
        "method=intervmerge",
        "method.interventions.attention.rank=4",
        "method.steps=60",
        "method.save_to='{log_dir}/intervmerge'",
        f"path.log_dir={folder / 'log'}",
        *TINY,
        *QUIET,
        cwd=folder,
    )
    return done, folder / "log"


# -- discovery ------------------------------------------------------------


@pytest.mark.parametrize("where", ["elsewhere", "repository"])
def test_the_plugin_is_found_from_any_directory(where, tmp_path):
    cwd = ROOT if where == "repository" else tmp_path
    shown = fusion_bench(
        "method=intervmerge", "modelpool=clip-vit-b32_TA8", "taskpool=clip-vit-b32_TA8", "--cfg",
        "job", cwd=cwd,
    ).stdout  # fmt: skip
    assert "fusion_bench_intervmerge.fusion.IntervMergeAlgorithm" in shown
    assert "tanganke/clip-vit-base-patch32_dtd" in shown


def compose(*overrides, **options):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    (folder,) = find_spec("fusion_bench_config").submodule_search_locations
    with initialize_config_dir(folder, version_base=None):
        return hydra_compose("fabric_model_fusion", overrides=list(overrides), **options)


def in_process(*overrides, folder):
    """What the command does after composing; a process of its own costs ten seconds of imports."""
    from fusion_bench.constants import RuntimeConstants
    from fusion_bench.scripts.cli import main
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    config = compose(
        *overrides,
        *QUIET,
        f"path.log_dir={folder / 'log'}",
        f"hydra.runtime.output_dir={folder}",
        return_hydra_config=True,
    )
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    try:
        return main(config)
    finally:
        HydraConfig.instance().cfg = None
        RuntimeConstants.debug = False  # what fast_dev_run=true leaves behind in the process


@pytest.mark.parametrize("size", ["b32", "b16", "l14"])
@pytest.mark.parametrize("tasks", ["TA8", "TALL14", "TALL20"])
def test_the_aliases_are_fusionbenchs_own_pools(size, tasks):
    long = {"b32": "base-patch32", "b16": "base-patch16", "l14": "large-patch14"}[size]
    ours = compose(f"modelpool=clip-vit-{size}_{tasks}", f"taskpool=clip-vit-{size}_{tasks}")
    stock = compose(f"modelpool=CLIPVisionModelPool/clip-vit-{long}_{tasks}")
    assert ours.modelpool.models == stock.modelpool.models
    assert ours.modelpool.test_datasets == stock.modelpool.test_datasets
    assert ours.taskpool._target_.endswith("fusion.hosted.CLIPVisionModelTaskPool")
    assert ours.taskpool.test_datasets == ours.modelpool.test_datasets
    assert ours.taskpool.base_model == f"openai/clip-vit-{long}"


@pytest.mark.parametrize(
    "method",
    [
        "surgery",
        "surgery_v2",
        *(
            f"intervmerge/{p.stem}"
            for p in (ROOT / "config" / "method" / "intervmerge").glob("*.yaml")
            if p.stem not in ("load", "analyse")
        ),
    ],
)
def test_every_preset_composes_and_is_accepted(method):
    from fusion_bench.utils import instantiate

    config = compose(f"method={method}").method
    assert config._target_.startswith("fusion_bench_intervmerge.fusion.")
    instantiate(config, _recursive_=False)


def test_fusionbenchs_own_surgery_keeps_its_name():
    assert compose("method=surgery/adamerging_surgery").method.name.endswith("adamerging_surgery")


def test_another_base_is_one_override():
    config = compose("method=intervmerge", "method@method.base=ties_merging").method
    assert config.base._target_ == "fusion_bench.method.TiesMergingAlgorithm"


def test_the_hook_is_light():
    """It runs at every start of every Hydra application."""
    code = (
        "import sys, time, hydra.core.config_search_path, hydra.plugins.search_path_plugin\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import hydra_plugins.fusion_bench_plugins\n"
        "print(sorted(set(sys.modules) - before), (time.perf_counter() - start) * 1000)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    # What it imports is its cost: itself and nothing else.
    assert shown.startswith("['hydra_plugins', 'hydra_plugins.fusion_bench_plugins']"), shown


def test_other_hydra_applications_are_left_alone(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "main.yaml").write_text("a: 1\n")
    (tmp_path / "app.py").write_text(
        "import hydra\n"
        "@hydra.main(config_path='conf', config_name='main', version_base=None)\n"
        "def main(cfg): pass\n"
        "main()\n"
    )
    shown = subprocess.run(
        [sys.executable, "app.py", "--info", "searchpath"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "fusion_bench" not in shown


# -- the main job ------------------------------------------------------------


def test_the_main_job_reports_what_it_did(run):
    done, log_dir = run
    report = json.loads((log_dir / "program_report.json").read_text())
    results = json.loads((log_dir / "intervmerge.json").read_text())
    ((name, story),) = results["models"].items()
    tasks = list(story["images_seen"])
    assert len(tasks) == 8 and set(tasks) < set(report) and tasks == results["tasks"]
    assert name == "task_arithmetic/intervmerge_r4/seed0" and story["kind"] == "repair"
    assert (story["base"], story["method"]) == ("task_arithmetic", "intervmerge_r4")
    assert (story["seed"], story["rank"]) == (0, 4)
    assert report["model_info"]["trainable_params"] == story["extra_parameters"]
    assert story["extra_parameters"] == 8 * 6 * (2 * 64 * 4 + 4)
    assert sum(story["extra_parameters_by_task"].values()) == story["extra_parameters"]
    assert story["images"] == [
        {"split": "test", "steps": 60, "batch_size": 16, "seed": 0, "transductive": True}
    ]
    for task in tasks:
        assert story["features"][task]["bias_after"] < story["features"][task]["bias_before"]
        assert len(story["losses"][task]) == 60
    assert "Images: 100% of the test split" in done.stdout  # before the repair
    assert "24,768 extra parameters over all tasks" in done.stdout  # after the evaluation
    assert "Pretrained" in done.stdout and "Task Arithmetic" in done.stdout
    # what FusionBench says meanwhile is in its file
    (log,) = log_dir.glob("*.log")
    assert "Loading model" in log.read_text() and "Loading model" not in done.stdout


STOCK = ["taskpool._target_=fusion_bench.taskpool.CLIPVisionModelTaskPool"]


@pytest.mark.parametrize("more", [[], STOCK], ids=["our task pool", "FusionBench's"])
def test_a_saved_model_is_evaluated_later_with_the_same_report(run, tmp_path, more):
    _, log_dir = run
    path = log_dir / "intervmerge"
    in_process("method=intervmerge/load", f"method.path={path}", *TINY, *more, folder=tmp_path)
    before = json.loads((log_dir / "program_report.json").read_text())
    after = json.loads((tmp_path / "log" / "program_report.json").read_text())
    assert after == before
    (then,), (now,) = (
        json.loads((folder / "intervmerge.json").read_text())["models"].values()
        for folder in (log_dir, tmp_path / "log")
    )
    assert {key: value for key, value in then.items() if key in now} == now
    assert {"base", "method", "seed", "rank", "images", "settings", "extra_parameters"} <= set(now)


def test_the_report_is_what_encode_gives(run):
    """The task pool's accuracies, recomputed from the saved model by hand."""
    from fusion_bench.models.hf_clip import HFCLIPClassifier
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    from fusion_bench_intervmerge.fusion.embedded.pool import (
        load_clip,
        load_dataset,
        load_processor,
    )

    _, log_dir = run
    model = InterventionModel.from_pretrained(log_dir / "intervmerge")
    report = json.loads((log_dir / "program_report.json").read_text())
    classifier = HFCLIPClassifier(load_clip(), load_processor())
    task = model.tasks[0]
    classifier.set_classification_task(*get_classnames_and_templates(task))
    items = list(load_dataset(task, "test"))
    pixels = load_processor()(images=[i["image"] for i in items], return_tensors="pt")
    labels = torch.tensor([item["label"] for item in items])
    with torch.no_grad():
        features = model.encode(pixels["pixel_values"], task)
    right = (features @ classifier.zeroshot_weights.T).argmax(dim=1) == labels
    assert float(right.float().mean()) == pytest.approx(report[task]["accuracy"], abs=1e-6)


def test_the_same_seed_gives_the_same_model(run, tmp_path):
    _, log_dir = run
    in_process(
        "method=intervmerge",
        "method.interventions.attention.rank=4",
        "method.steps=60",
        f"method.save_to={tmp_path / 'again'}",
        "modelpool=clip-vit-tiny_TA8",
        folder=tmp_path,
    )
    for path in sorted((log_dir / "intervmerge" / "interventions").iterdir()):
        again = load_file(tmp_path / "again" / "interventions" / path.name)
        assert all(torch.equal(again[n], t) for n, t in load_file(path).items())


def test_without_a_task_pool_it_tells_how_far_it_got(tmp_path, capfd):
    overrides = ["method=intervmerge", "modelpool=clip-vit-tiny_TA8", "fast_dev_run=true"]
    in_process(*overrides, folder=tmp_path)
    shown = " ".join(capfd.readouterr().out.split())
    assert "agreement" in shown and "bias" in shown
    assert "add a task pool: taskpool=clip-vit-tiny_TA8" in shown


def test_a_saved_merge_in_the_pool_wins_over_the_base(run, tmp_path):
    _, log_dir = run
    merged = log_dir / "intervmerge" / "merged"
    in_process(
        "method=surgery",
        f"+modelpool.models._merged_={merged}",
        f"method.save_to={tmp_path / 'again'}",
        "modelpool=clip-vit-tiny_TA8",
        "fast_dev_run=true",
        folder=tmp_path,
    )
    digests = [
        json.loads((folder / "config.json").read_text())["files"]["merged/model.safetensors"]
        for folder in (log_dir / "intervmerge", tmp_path / "again")
    ]
    assert digests[0] == digests[1]
    (story,) = json.loads((tmp_path / "log" / "intervmerge.json").read_text())["models"].values()
    assert (story["base"], story["method"]) == ("merged", "surgery_r16"), "no base was run"


def test_a_new_task_joins_a_saved_model(run, tmp_path):
    _, log_dir = run
    model = InterventionModel.from_pretrained(log_dir / "intervmerge")
    left, before = model.tasks[-1], dict(model.edits_of(model.tasks[0]).state_dict())
    model.drop_task(left)
    model.save_pretrained(tmp_path / "seven")
    in_process(
        "method=intervmerge",
        f"method.extend={tmp_path / 'seven'}",
        f"method.save_to={tmp_path / 'eight'}",
        "modelpool=clip-vit-tiny_TA8",
        "fast_dev_run=true",
        folder=tmp_path,
    )
    again = InterventionModel.from_pretrained(tmp_path / "eight")
    assert again.tasks == [*model.tasks, left]
    about = again.metadata
    assert about["method"] == model.metadata["method"] and about["transductive"]
    assert about["images"][:-1] == model.metadata["images"]
    assert about["images"][-1]["tasks"] == [left] and about["images"][-1]["split"] == "test"
    card = " ".join((tmp_path / "eight" / "README.md").read_text().split())
    assert f"seed 0; {left}: 100% of the test split, unlabelled, 2 steps of 16" in card
    (added,) = about["extended"]
    assert added["tasks"] == [left] and added["method"]["interventions"]["attention"]["rank"] == 4
    after = again.edits_of(model.tasks[0]).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # its edits are trained, and the preset of the closed form would leave them at their start
    with pytest.raises(ConfigError, match="steps: 0, but the saved model's edits are trained"):
        in_process(
            "method=intervmerge/closed_form",
            f"method.extend={tmp_path / 'seven'}",
            "modelpool=clip-vit-tiny_TA8",
            folder=tmp_path,
        )


def test_an_old_style_base_runs_nested(tmp_path):
    result = in_process(
        "method=intervmerge",
        "method@method.base=adamerging/clip",
        "method.base.num_workers=0",
        "fast_dev_run=true",
        *TINY,
        folder=tmp_path,
    )
    assert (tmp_path / "log" / "merging_weights.pt").exists()
    assert result["report"]["average"]["accuracy"] > 0


FAMILIES = {"clip-vit-tiny_TA8": [0, 1], "openclip-vit-tiny_TA8": [0]}  # and their seeds


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """The demonstration, short, in both families."""
    folders = {}
    for family, seeds in FAMILIES.items():
        folder = tmp_path_factory.mktemp("comparison")
        overrides = ["method=intervmerge/compare", f"method.seeds={seeds}", "method.steps=25"]
        pools = [f"modelpool={family}", f"taskpool={family}"]
        pools += ["+method/rivals@method.rivals.emr=emr_merging"]
        in_process(*overrides, *pools, folder=folder)
        folders[family] = folder / "log"
    return folders


@pytest.fixture(params=FAMILIES)
def comparison(request, comparisons):
    return comparisons[request.param]


@pytest.fixture
def seeds(request):
    return FAMILIES[request.node.callspec.params["comparison"]]


def test_both_families_reach_the_same_accuracies(comparisons):
    reports = [json.loads((f / "program_report.json").read_text()) for f in comparisons.values()]
    results = [json.loads((f / "intervmerge.json").read_text()) for f in comparisons.values()]
    tasks = results[0]["tasks"]
    both = [set(found["models"]) for found in results]
    assert both[1] == {name for name in both[0] if not name.endswith("/seed1")}
    # EMR's scales are sums of means, a tensor each, and OpenCLIP has queries, keys, values in one
    for name in both[1] - {"emr"}:
        for task in tasks:
            # 480 images: rounding may turn one or two of them
            theirs = pytest.approx(reports[1][name][task]["accuracy"], abs=2.5 / 480)
            assert reports[0][name][task]["accuracy"] == theirs, (name, task)


def test_a_comparison_evaluates_every_model_alike(comparison, seeds):
    report = json.loads((comparison / "program_report.json").read_text())
    about = json.loads((comparison / "intervmerge.json").read_text())["models"]
    assert set(about) == set(report)
    average = {name: report[name]["average"]["accuracy"] for name in about}
    assert average["experts"] > average["task_arithmetic"] + 0.2
    # a rival that edits weights; its paper has it far above Task Arithmetic, below the experts
    assert average["task_arithmetic"] + 0.2 < average["emr"] < average["experts"]
    prefix = "task_arithmetic/intervmerge_r4/seed"
    repairs = [name for name in about if name.startswith(prefix)]
    assert repairs == [f"{prefix}{seed}" for seed in seeds]
    # solved on all images: no seed decides anything
    solved = [name for name in about if "closed_form_rank_4" in name]
    assert solved == ["task_arithmetic/closed_form_rank_4"]
    for name in repairs:
        assert average[name] > average["task_arithmetic"]
        assert about[name]["extra_parameters"] == 8 * 6 * (2 * 64 * 4 + 4)
        assert about[name]["extra_parameters"] == report[name]["model_info"]["trainable_params"]


def test_the_report_shows_what_the_task_pool_said(comparison, tmp_path):
    from fusion_bench_intervmerge.cli import main

    assert main(["report", str(comparison), "--to", str(tmp_path / "report")]) == 0
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "table.md", "table.csv", "accuracy_vs_parameters.png"} <= names
    report = json.loads((comparison / "program_report.json").read_text())
    shown = (tmp_path / "report" / "table.md").read_text()
    assert f"{100 * report['experts']['average']['accuracy']:.1f}" in shown


# -- errors ------------------------------------------------------------


EDIT = "interventions.attention"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"method.{EDIT}.function=reft"], f"{EDIT}.function: there is no function 'reft'"),
        ([f"method.{EDIT}.rank=65"], f"{EDIT}.rank: 65 does not fit vectors of width 64"),
        ([f"method.{EDIT}.part=[32,80]"], f"{EDIT}.part: [32, 80] lies outside the width 64"),
        ([f"method.{EDIT}.blocks=[6]"], f"{EDIT}.blocks: there is no block 6"),
        (["modelpool=clip-vit-b32_TA8"], "modelpool.models._pretrained_: could not be loaded"),
        (["+method.data.cache=1"], "data.cache: no such setting"),
        (["method.data.split=all"], "data.split: 'all'; allowed: test, validation, train"),
        (["method.save_every=0"], "save_every: 0; allowed: a whole number, 1 to"),
        (["+method.coefficients.keep=abc"], "coefficients.keep: 'abc'; allowed: a fraction"),
        (["method.resume=maybe"], "resume: 'maybe'; allowed: auto, never"),
        (["method.optimizer.lr=-1"], "optimizer: Invalid learning rate"),
        (["+method.coefficients.init=base"], "coefficients.init: `base` is no AdaMerging"),
        (["method.save_to=/proc/self/model"], "save_to: /proc/self cannot be written to"),
        (["method.save_to='{log_dir}'"], "is where the run's logs go; allowed: '{log_dir}/"),
        (["method.save_to=/etc"], "save_to: /etc holds "),
    ],
)
def test_an_error_is_one_line_that_says_where(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chosen = ["modelpool=clip-vit-tiny_TA8"] * (not overrides[0].startswith("modelpool"))
    with pytest.raises(ConfigError) as error:
        in_process("method=intervmerge", "fast_dev_run=true", *chosen, *overrides, folder=tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    if "could not be loaded" in message:
        assert "modelpool=clip-vit-mini_TA8" in str(error.value)
        assert "openai/clip-vit-base-patch32" in str(error.value)


def test_a_pool_without_experts():
    from fusion_bench import BaseModelPool

    from fusion_bench_intervmerge.fusion.pools import ExpertPool

    with pytest.raises(ConfigError, match="there are no experts"):
        ExpertPool(BaseModelPool({"_pretrained_": "somewhere"}))


def test_a_task_of_a_bad_name():
    from fusion_bench import BaseModelPool

    from fusion_bench_intervmerge.fusion.pools import ExpertPool

    with pytest.raises(ConfigError, match=r"modelpool\.models: '/tmp/x' cannot name a task"):
        ExpertPool(BaseModelPool({"_pretrained_": "somewhere", "/tmp/x": "elsewhere"}))


def test_live_models_stay_as_they_are():
    """A pool may hold modules; merging, hooks and freezing happen to copies."""
    from conftest import TASKS, fine_tuned, hf_tower
    from fusion_bench import BaseModelPool
    from fusion_bench.method import TaskArithmeticAlgorithm

    from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
    from fusion_bench_intervmerge.fusion.pools import ExpertPool

    models = {"_pretrained_": hf_tower().model}
    models |= {task: load().model for task, load in fine_tuned(hf_tower).items()}
    before = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in models.items()}
    pool = ExpertPool(BaseModelPool(dict(models)))
    pool._projection = hf_tower().projection  # a live `_pretrained_` has none
    method = IntervMergeAlgorithm(
        {"attention": {}}, base=TaskArithmeticAlgorithm(scaling_factor=0.3)
    )
    merged, _ = method.merge(pool)
    InterventionModel(merged, TASKS, {"attention": {}})
    assert not torch.equal(
        merged.model.state_dict()["vision_model.post_layernorm.bias"],
        before["_pretrained_"]["vision_model.post_layernorm.bias"],
    )
    for name, model in models.items():
        assert all(torch.equal(before[name][k], t) for k, t in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())


def test_a_stopped_run_knows_its_images():
    """A state is found by its run's identity, which other images of the split in use change."""
    from conftest import hf_tower
    from fusion_bench import BaseModelPool

    from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
    from fusion_bench_intervmerge.fusion.pools import ExpertPool

    method = IntervMergeAlgorithm({"attention": {}})
    model = InterventionModel(hf_tower(), ["bees"], {"attention": {}})

    def identity(test, train):
        models = {"_pretrained_": "an encoder", "bees": "an expert"}
        sets = {"test_datasets": {"bees": test}, "train_datasets": {"bees": train}}
        return method._identity(ExpertPool(BaseModelPool(models, **sets)), model, ["bees"])

    assert identity("a", "b") == identity("a", "c") != identity("b", "b")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        # what safetensors and the folder's own files say on a full disk, which no test can be given
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
        (ConfigError("model", "cannot be written (No space left)"), "No space left"),
        (KeyboardInterrupt(), "stopped while saving the model; the same command goes on from step"),
    ],
)
def test_a_training_outlives_a_save_that_failed(failure, said, tmp_path, monkeypatch):
    from fusion_bench_intervmerge.tinyclip import ensure_pool

    pool = ensure_pool()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / pool.name).symlink_to(pool)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))  # states of its own

    def run(name, *more):
        command = ["method=intervmerge", "method.steps=3", "modelpool=clip-vit-tiny_TA8"]
        command += [
            "modelpool.tasks=[colours,counting]",
            f"method.save_to={tmp_path / name}",
            *more,
        ]
        in_process(*command, folder=tmp_path)
        return tmp_path / name

    undisturbed = run("undisturbed", "method.resume=never")
    with monkeypatch.context() as patch:

        def fail(*args):
            raise failure

        patch.setattr("fusion_bench_intervmerge.model.artifact.Artifact.write", fail)
        with pytest.raises((ConfigError, SystemExit)) as error:
            run("saved")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "the same command goes on" in str(error.value) and not (tmp_path / "saved").exists()
    monkeypatch.setattr(loop._Trainer, "_step", None)  # no step is left to be done
    saved = run("saved")
    for file in (undisturbed / "interventions").iterdir():
        assert file.read_bytes() == (saved / "interventions" / file.name).read_bytes()
    (story,) = json.loads((tmp_path / "log" / "intervmerge.json").read_text())["models"].values()
    assert story["resumed_at"] == 3
    assert not list((tmp_path / "cache" / "states").iterdir()), "the artifact stands"


def test_a_live_pretrained_model_is_one_line():
    from conftest import hf_tower
    from fusion_bench import CLIPVisionModelPool

    from fusion_bench_intervmerge.fusion.pools import ExpertPool

    pool = ExpertPool(CLIPVisionModelPool({n: hf_tower().model for n in ("_pretrained_", "bees")}))
    with pytest.raises(ConfigError, match=r"models\._pretrained_: is a live module"):
        pool.tower("bees")


def test_agreement_is_shown_for_the_tasks_that_have_it():
    from rich.console import Console

    from fusion_bench_intervmerge.fusion.records import diagnosis_table as table

    bias = {"bias_before": 1.0, "bias_after": 0.5}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(
        table({"a": bias | {"agreement_before": 0.25, "agreement_after": 0.75}, "b": bias})
    )
    shown = console.export_text()
    assert shown.count("75.0%") == 2, "of the task and of the average"
    assert [line.split()[-2] for line in shown.splitlines() if " b " in line] == ["-"]


def test_experts_of_different_shape(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    small |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    CLIPVisionModel(CLIPVisionConfig(**small)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"modelpool\.models\.letters: .*fc1\S* has shape \(128"):
        in_process(
            "method=intervmerge",
            f"+modelpool.models.letters={tmp_path / 'narrow'}",
            "modelpool=clip-vit-tiny_TA8",
            folder=tmp_path,
        )


def test_the_command_ends_with_that_line(tmp_path):
    log = tmp_path / "log"
    given = ["method=intervmerge", "+method.stepss=5", f"path.log_dir={log}", *TINY, *QUIET]
    done = fusion_bench(*given, cwd=tmp_path, check=False)
    line = "method.stepss: no such setting, did you mean steps?; allowed: interventions, base,"
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    (told,) = [shown for shown in done.stderr.splitlines() if line in shown]
    assert told.startswith(line)
    # Hydra's own two lines stand around it (and on a GPU one of Lightning's); what FusionBench logs
    # of it is in its file
    lines = [shown for shown in done.stderr.splitlines() if shown and "CUDA device" not in shown]
    assert len(lines) == 3
    assert any("Traceback" in file.read_text() for file in log.glob("*.log"))


def test_within_hydra_an_error_is_one_that_hydra_shows_as_a_line(tmp_path):
    import pickle

    from hydra.errors import CompactHydraException

    with pytest.raises(ConfigError) as error:
        in_process("method=intervmerge", "method.steps=a", *TINY, folder=tmp_path)
    assert isinstance(error.value, CompactHydraException)
    assert type(error.value.__cause__) is ConfigError  # what HYDRA_FULL_ERROR=1 shows
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # from a launcher


def test_ctrl_c_is_one_line(tmp_path, monkeypatch):
    from fusion_bench_intervmerge.data import Interrupted

    told = "stopped after step 12 of 200; the same command goes on from there"

    def stop(*args, **kwargs):
        raise Interrupted(told)

    monkeypatch.setattr("fusion_bench_intervmerge.fusion.algorithm.distill", stop)
    with pytest.raises(SystemExit) as stopped:  # which Python shows as its message alone
        in_process("method=intervmerge", "modelpool=clip-vit-tiny_TA8", folder=tmp_path)
    assert stopped.value.code == told


# -- in closed form --------------------------------------------------------------------------------


def test_the_closed_form_spends_a_budget_and_is_refined(tmp_path):
    def run(name, *more):
        command = ["method=intervmerge/closed_form", "method.budget=1000", "method.resume=never"]
        command += ["modelpool=clip-vit-tiny_TA8", "modelpool.tasks=[colours,counting]"]
        in_process(*command, f"method.save_to={tmp_path / name}", *more, folder=tmp_path)
        model = InterventionModel.from_pretrained(tmp_path / name)
        results = json.loads((tmp_path / "log" / "intervmerge.json").read_text())
        (story,) = results["models"].values()
        return model, story

    model, report = run("solved", "method.data.images=40")
    assert report["extra_parameters"] == model.extra_parameters()["total"] == 7 * 129
    assert report["images_seen"] == {"colours": 40, "counting": 40} and "losses" not in report
    assert (report["method"], report["budget"]) == ("intervmerge_closed_form_b1000", 1000)
    (images,) = report["images"]
    assert images["at_most"] == 40 and images["solved"] and "steps" not in images
    assert all(row["bias_after"] < row["bias_before"] for row in report["features"].values())
    refined, report = run("refined", "method.data.images=40", "method.steps=3")
    assert refined.ranks() == model.ranks()
    (images,) = report["images"]
    assert images["solved"] and (images["steps"], images["batch_size"]) == (3, 16)
    assert len(report["losses"]["colours"]) == 3
    solved, trained = model.edits.state_dict(), refined.edits.state_dict()
    assert any(not torch.equal(solved[name], trained[name]) for name in solved)
