"""The command, composed by Hydra for real, on the embedded pool."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import pytest
import torch
from commands import (
    QUIET,
    ROOT,
    TINY,
    command,
    compose,
    evaluating,
    in_process,
    only,
    read_json,
    run_command,
)
from conftest import TASKS, fine_tuned, hf_tower
from fusion_bench import BaseModelPool, CLIPVisionModelPool
from fusion_bench.method import TaskArithmeticAlgorithm
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from fusion_bench.utils import instantiate
from hydra.errors import CompactHydraException
from rich.console import Console
from safetensors import SafetensorError

from fusion_bench_intervmerge.cli import main
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.distillation import loop
from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
from fusion_bench_intervmerge.fusion.embedded.pool import load_clip, load_dataset, load_processor
from fusion_bench_intervmerge.fusion.host import OneLineError
from fusion_bench_intervmerge.fusion.pools import ExpertPool
from fusion_bench_intervmerge.fusion.records import diagnosis_table
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.report.answers import read_answers

THREE = ["digits", "counting", "positions"]
POOL = "modelpool=clip-vit-tiny_TA8"
REPAIR = ["method=intervmerge", "method.interventions.attention.rank=4", "method.steps=30"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The main job, short: base merge, repair, evaluation, a saved model."""
    folder = tmp_path_factory.mktemp("run")
    save = ["method.save_to='{log_dir}/intervmerge'", "path.log_dir=log"]
    run_command(*REPAIR, *save, *only(*THREE), *QUIET, folder=folder)
    return folder / "log"


def only_result(folder):
    ((name, result),) = read_json(folder / "intervmerge.json")["models"].items()
    return name, result


# -- discovery -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["elsewhere", "repository"])
def test_the_plugin_is_found_from_any_directory(where, tmp_path):
    pools = ["modelpool=clip-vit-b32_TA8", "taskpool=clip-vit-b32_TA8"]
    cwd = ROOT if where == "repository" else tmp_path
    shown = command("method=intervmerge", *pools, "--cfg", "job", cwd=cwd).stdout
    assert "fusion_bench_intervmerge.fusion.IntervMergeAlgorithm" in shown
    assert "tanganke/clip-vit-base-patch32_dtd" in shown


@pytest.mark.parametrize(
    ("name", "long"),
    [
        ("b32_TA8", "base-patch32_TA8"),
        ("b16_TALL14", "base-patch16_TALL14"),
        ("l14_TALL20", "large-patch14_TALL20"),
    ],
)
def test_the_aliases_are_fusionbenchs_own_pools_with_the_data_sets_owners(name, long):
    ours = compose(f"modelpool=clip-vit-{name}", f"taskpool=clip-vit-{name}")
    stock = compose(f"modelpool=CLIPVisionModelPool/clip-vit-{long}").modelpool
    assert ours.modelpool.models == stock.models
    for split in ("train", "val", "test"):
        owned, named = (pool.get(f"{split}_datasets") for pool in (ours.modelpool, stock))
        if not owned:
            continue
        inner = (lambda task: task.dataset) if split == "val" else (lambda task: task)
        assert inner(owned.mnist).path == "ylecun/mnist"
        assert list(inner(owned.svhn)._args_) == ["ufldl-stanford/svhn", "cropped_digits"]
        inner(owned.mnist).path, inner(owned.svhn)._args_[0] = "mnist", "svhn"
        assert not named or owned == named
    assert ours.taskpool._target_.endswith("fusion.hosted.CLIPVisionModelTaskPool")
    assert ours.taskpool.test_datasets.mnist.path == "ylecun/mnist"
    assert ours.taskpool.base_model == f"openai/clip-vit-{long.rpartition('_')[0]}"


PRESETS = sorted(
    str(path.relative_to(ROOT / "config" / "method").with_suffix(""))
    for path in (ROOT / "config" / "method").rglob("*.yaml")
    if path.parent.name != "rivals" and path.stem not in ("load", "analyse")
)


@pytest.mark.parametrize("method", PRESETS)
def test_every_preset_is_accepted(method):
    config = compose("+fast_dev_run=false", config=f"method/{method}").method
    config = config.get("intervmerge", config)  # a preset in a folder is composed under its name
    assert config._target_.startswith("fusion_bench_intervmerge.fusion.")
    instantiate(config, _recursive_=False)


def test_the_hook_is_light():
    """It runs at every start of every Hydra application."""
    code = (
        "import sys, hydra.core.config_search_path, hydra.plugins.search_path_plugin\n"
        "before = set(sys.modules)\n"
        "import hydra_plugins.fusion_bench_plugins\n"
        "print(sorted(set(sys.modules) - before))"
    )
    options = {"capture_output": True, "text": True, "check": True, "cwd": "/"}
    shown = subprocess.run([sys.executable, "-c", code], **options).stdout
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
    words = [sys.executable, "app.py", "--info", "searchpath"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "fusion_bench" not in shown


# -- the main job ----------------------------------------------------------------------------------


def test_the_main_job_reports_what_it_did(run):
    report = read_json(run / "program_report.json")
    name, result = only_result(run)
    references = read_json(run / "reference_report.json")
    assert list(references) == ["pretrained", "task_arithmetic"]
    assert list(result["images_seen"]) == THREE and set(THREE) < set(report)
    assert name == "task_arithmetic/intervmerge_r4/seed0" and result["kind"] == "repair"
    assert (result["base"], result["method"]) == ("task_arithmetic", "intervmerge_r4")
    assert (result["seed"], result["rank"]) == (0, 4)
    assert report["model_info"]["trainable_params"] == result["extra_parameters"]
    assert result["extra_parameters"] == 3 * 6 * (2 * 64 * 4 + 4)
    assert sum(result["extra_parameters_by_task"].values()) == result["extra_parameters"]
    assert result["images"] == [
        {"split": "test", "steps": 30, "batch_size": 16, "seed": 0, "transductive": True}
    ]
    for task in THREE:
        assert result["features"][task]["bias_after"] < result["features"][task]["bias_before"]
        assert len(result["losses"][task]) == 30


def test_the_answers_add_up_to_the_accuracies(run, tmp_path):
    answers, (name, _) = read_answers(run), only_result(run)
    reports = read_json(run / "reference_report.json")
    reports[name] = read_json(run / "program_report.json")
    assert set(answers.models) == set(reports)
    for model, report in reports.items():
        for task in THREE:
            assert answers.right(model, task).mean() == pytest.approx(report[task]["accuracy"])
    for task in THREE:  # of the images that the merge gets wrong some are kept
        assert not answers.right("task_arithmetic", task)[list(answers.images[task])].any()
    main(["report", str(run), "--to", str(tmp_path)])
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<section>") == 3 and "data:image/png;base64," in page
    assert (tmp_path / "differences.csv").read_text().count("\n") == 2


def test_the_screen_shows_ours_and_the_log_file_has_everything(tmp_path, capfd):
    words = ["method=intervmerge", "path.log_dir=log", "fast_dev_run=true"]
    run_command(*words, *only("digits"), *QUIET, folder=tmp_path)
    shown = capfd.readouterr().out
    assert "Images: 100% of the test split" in shown  # before the repair
    (log,) = (tmp_path / "log").glob("*.log")
    assert "Loading model" in log.read_text() and "Loading model" not in shown


STOCK = ["taskpool._target_=fusion_bench.taskpool.CLIPVisionModelTaskPool"]


@pytest.mark.parametrize("more", [[], STOCK], ids=["our task pool", "FusionBench's"])
def test_a_saved_model_is_evaluated_later_with_the_same_report(run, tmp_path, more):
    load = ["method=intervmerge/load", f"method.path={run / 'intervmerge'}"]
    in_process(*load, *only(*THREE), *more, folder=tmp_path)
    before, after = (read_json(f / "program_report.json") for f in (run, tmp_path / "log"))
    assert after == before
    (_, then), (_, now) = only_result(run), only_result(tmp_path / "log")
    assert {key: value for key, value in then.items() if key in now} == now
    assert {"base", "method", "seed", "rank", "images", "settings", "extra_parameters"} <= set(now)


def test_a_task_that_the_model_does_not_know_is_marked(run, tmp_path, caplog):
    load = ["method=intervmerge/load", f"method.path={run / 'intervmerge'}"]
    pools = [*TINY, *evaluating("digits", "shapes")]
    report = in_process(*load, *pools, "fast_dev_run=true", folder=tmp_path)["report"]
    assert report["shapes"]["unseen"] and "unseen" not in report["digits"]
    assert "no expert knows shapes" in caplog.text


@torch.no_grad()
def test_the_report_is_what_encode_gives(run):
    """The task pool's accuracies, recomputed from the saved model by hand."""
    model = InterventionModel.from_pretrained(run / "intervmerge")
    report = read_json(run / "program_report.json")
    classifier = HFCLIPClassifier(load_clip(), load_processor())
    task = model.tasks[0]
    classifier.set_classification_task(*get_classnames_and_templates(task))
    items = list(load_dataset(task, "test"))
    pixels = load_processor()(images=[i["image"] for i in items], return_tensors="pt")
    labels = torch.tensor([item["label"] for item in items])
    features = model.encode(pixels["pixel_values"], task)
    right = (features @ classifier.zeroshot_weights.T).argmax(dim=1) == labels
    assert float(right.float().mean()) == pytest.approx(report[task]["accuracy"], abs=1e-6)


def test_without_a_task_pool_the_same_model_and_how_far_it_got(run, tmp_path, capfd):
    three = [POOL, f"modelpool.tasks=[{','.join(THREE)}]"]
    in_process(*REPAIR, f"method.save_to={tmp_path / 'again'}", *three, folder=tmp_path)
    shown = " ".join(capfd.readouterr().out.split())
    assert "agreement" in shown and "bias" in shown
    assert "add a task pool: taskpool=clip-vit-tiny_TA8" in shown
    for path in sorted((run / "intervmerge" / "interventions").iterdir()):
        again = tmp_path / "again" / "interventions" / path.name
        assert again.read_bytes() == path.read_bytes(), "the same seed gives the same model"


def test_a_saved_merge_in_the_pool_wins_over_the_base(run, tmp_path):
    merged = run / "intervmerge" / "merged"
    save = f"method.save_to={tmp_path / 'again'}"
    pool = [POOL, "modelpool.tasks=[digits]", f"+modelpool.models._merged_={merged}"]
    in_process("method=surgery", save, *pool, "fast_dev_run=true", folder=tmp_path)
    digests = [
        read_json(folder / "config.json")["files"]["merged/model.safetensors"]
        for folder in (run / "intervmerge", tmp_path / "again")
    ]
    assert digests[0] == digests[1]
    _, result = only_result(tmp_path / "log")
    assert (result["base"], result["method"]) == ("merged", "surgery_r16"), "no base was run"


def test_a_new_task_joins_a_saved_model(run, tmp_path):
    model = InterventionModel.from_pretrained(run / "intervmerge")
    left, before = model.tasks[-1], dict(model.edits_of(model.tasks[0]).state_dict())
    model.drop_task(left)
    model.save_pretrained(tmp_path / "two")
    extend = [f"method.extend={tmp_path / 'two'}", POOL, f"modelpool.tasks=[{','.join(THREE)}]"]
    save = f"method.save_to={tmp_path / 'three'}"
    in_process("method=intervmerge", *extend, save, "fast_dev_run=true", folder=tmp_path)
    again = InterventionModel.from_pretrained(tmp_path / "three")
    assert again.tasks == [*model.tasks, left]
    about = again.metadata
    assert about["method"] == model.metadata["method"] and about["transductive"]
    assert about["images"][:-1] == model.metadata["images"]
    assert about["images"][-1]["tasks"] == [left] and about["images"][-1]["split"] == "test"
    card = " ".join((tmp_path / "three" / "README.md").read_text().split())
    assert f"seed 0; {left}: 100% of the test split, unlabelled, 2 steps of 16" in card
    (added,) = about["extended"]
    assert added["tasks"] == [left] and added["method"]["interventions"]["attention"]["rank"] == 4
    after = again.edits_of(model.tasks[0]).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # its edits are trained, and the preset of the closed form would leave them at their start
    with pytest.raises(CompactHydraException, match="steps: 0, but the saved model's edits are tr"):
        in_process("method=intervmerge/closed_form", *extend, folder=tmp_path)


# -- a comparison ----------------------------------------------------------------------------------

FAMILIES = {"clip-vit-tiny_TA8": [0, 1], "openclip-vit-tiny_TA8": [0]}  # and their seeds


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """The demonstration, short, in both families: all experts, evaluated on three tasks."""
    folders = {}
    for family, seeds in FAMILIES.items():
        folder = tmp_path_factory.mktemp("comparison")
        words = ["method=intervmerge/compare", f"method.seeds={seeds}", "method.steps=20"]
        left_out = ["calibration", "calibrated_b3096", "calibrated_b12384"]
        left_out += ["intervmerge_r1", "surgery_r16"]
        words += [f"~method.methods.{name}" for name in left_out]
        words += ["method.data.split=test", "method.data.images=null"]
        words += [f"modelpool={family}", f"taskpool={family}", *evaluating(*THREE)]
        in_process(*words, "+method/rivals@method.rivals.emr=emr_merging", folder=folder)
        folders[family] = folder / "log"
    return folders


def test_both_families_reach_the_same_accuracies(comparisons):
    theirs, ours = (read_json(f / "program_report.json") for f in comparisons.values())
    assert set(ours) == {name for name in theirs if not name.endswith("/seed1")}
    # EMR's scales are sums of means per tensor, and OpenCLIP has queries, keys, values in one
    for name in set(ours) - {"emr"}:
        for task in THREE:
            # 480 images: rounding may turn one or two of them
            wanted = pytest.approx(ours[name][task]["accuracy"], abs=2.5 / 480)
            assert theirs[name][task]["accuracy"] == wanted, (name, task)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_comparison_evaluates_every_model_alike(comparisons, family):
    report = read_json(comparisons[family] / "program_report.json")
    results = read_json(comparisons[family] / "intervmerge.json")["models"]
    assert set(results) == set(report)
    average = {name: report[name]["average"]["accuracy"] for name in results}
    assert average["experts"] > average["task_arithmetic"] + 0.2
    # a rival that edits weights; its paper has it far above Task Arithmetic, below the experts
    assert average["task_arithmetic"] + 0.1 < average["emr"] < average["experts"]
    prefix = "task_arithmetic/intervmerge_r4/seed"
    repairs = [name for name in results if name.startswith(prefix)]
    assert repairs == [f"{prefix}{seed}" for seed in FAMILIES[family]]
    # solved on all images: no seed decides anything
    solved = [name for name in results if "closed_form_rank_1" in name]
    assert solved == ["task_arithmetic/closed_form_rank_1"]
    for name in repairs:
        assert average[name] > average["task_arithmetic"]
        assert results[name]["extra_parameters"] == 8 * 6 * (2 * 64 * 4 + 4)
        assert results[name]["extra_parameters"] == report[name]["model_info"]["trainable_params"]


# -- errors ----------------------------------------------------------------------------------------

EDIT = "method.interventions.attention"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{EDIT}.rank=65"], f"{EDIT}.rank: 65 does not fit vectors of width 64"),
        ([f"{EDIT}.part=[32,80]"], f"{EDIT}.part: [32, 80] lies outside the width 64"),
        ([f"{EDIT}.blocks=[6]"], f"{EDIT}.blocks: there is no block 6"),
        (["modelpool=clip-vit-b32_TA8"], "modelpool.models._pretrained_: could not be loaded"),
        (["method.optimizer.lr=-1"], "method.optimizer: Invalid learning rate"),
        (["+method.coefficients.init=base"], "coefficients.init: `base` is not an AdaMerging"),
        (["method.save_to=/proc/self/model"], "save_to: /proc/self cannot be written to"),
        (["method.save_to='{log_dir}'"], "is where the run's logs go; allowed: '{log_dir}/"),
        (["method.save_to=/etc"], "method.save_to: /etc holds "),
    ],
)
def test_an_error_is_one_line_that_says_where(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pool = [POOL, "modelpool.tasks=[digits]"] * (not overrides[0].startswith("modelpool"))
    with pytest.raises(OneLineError) as error:
        in_process("method=intervmerge", "fast_dev_run=true", *pool, *overrides, folder=tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, ConfigError)  # what HYDRA_FULL_ERROR=1 shows
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # from a launcher
    if "could not be loaded" in message:
        assert "modelpool=clip-vit-mini_TA8" in str(error.value)
        assert "openai/clip-vit-base-patch32" in str(error.value)


def test_the_command_ends_with_that_line(tmp_path, capfd):
    words = ["method=intervmerge", "+method.stepss=5", "path.log_dir=log", *TINY, *QUIET]
    with pytest.raises(SystemExit) as stopped:
        run_command(*words, folder=tmp_path)
    shown = capfd.readouterr()
    line = "method.stepss: no such setting, did you mean steps?; allowed: interventions, base,"
    assert stopped.value.code == 1 and "Traceback" not in shown.out + shown.err
    assert any(each.startswith(line) for each in shown.err.splitlines())
    # what FusionBench logs of it is in its file
    assert any("Traceback" in file.read_text() for file in (tmp_path / "log").glob("*.log"))


def test_ctrl_c_is_one_line(tmp_path, monkeypatch):
    message = "stopped after step 12 of 200; the same command goes on from there"

    def stop(*args, **kwargs):
        raise loop.Interrupted(message)

    monkeypatch.setattr("fusion_bench_intervmerge.fusion.algorithm.distill", stop)
    with pytest.raises(SystemExit) as stopped:  # which Python shows as its message alone
        in_process("method=intervmerge", POOL, "modelpool.tasks=[digits]", folder=tmp_path)
    assert stopped.value.code == message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["_pretrained_"], "there are no experts"),
        (["_pretrained_", "/tmp/x"], r"modelpool\.models: '/tmp/x' cannot name a task"),
    ],
)
def test_a_pool_that_does_not_fit(names, message):
    with pytest.raises(ConfigError, match=message):
        ExpertPool(BaseModelPool(dict.fromkeys(names, "somewhere")))


def test_a_live_pretrained_model_is_one_line():
    pool = ExpertPool(CLIPVisionModelPool({n: hf_tower().model for n in ("_pretrained_", "bees")}))
    with pytest.raises(ConfigError, match=r"models\._pretrained_: is a live module"):
        pool.tower("bees")


# -- one method object -----------------------------------------------------------------------------


def test_live_models_stay_as_they_are():
    """A pool may hold modules; merging, hooks and freezing happen to copies."""
    models = {"_pretrained_": hf_tower().model}
    models |= {task: load().model for task, load in fine_tuned(hf_tower).items()}
    before = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in models.items()}
    pool = ExpertPool(BaseModelPool(dict(models)))
    pool._projection = hf_tower().projection  # a live `_pretrained_` has none
    base = TaskArithmeticAlgorithm(scaling_factor=0.3)
    merged = IntervMergeAlgorithm({"attention": {}}, base=base).merge(pool).tower
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
    method = IntervMergeAlgorithm({"attention": {}})
    model = InterventionModel(hf_tower(), ["bees"], {"attention": {}})

    def identity(test, train):
        models = {"_pretrained_": "an encoder", "bees": "an expert"}
        sets = {"test_datasets": {"bees": test}, "train_datasets": {"bees": train}}
        pool = ExpertPool(BaseModelPool(models, **sets))
        return method._identity(pool, model, ["bees"], method._describe(model, ["bees"]))

    assert identity("a", "b") == identity("a", "c") != identity("b", "b")


def test_a_training_outlives_an_evaluation_that_failed(tmp_path, own_cache, monkeypatch):
    """What is wrong with the last test image shows after the repair, and costs no second one."""
    words = ["method=intervmerge", "method.steps=3", "method.data.images=8", *only("digits")]
    with monkeypatch.context() as broken:

        def fail(*args, **kwargs):
            raise ConfigError("taskpool.test_datasets.digits[479]", "cannot be read")

        broken.setattr(HFCLIPClassifier, "forward", fail)
        with pytest.raises(OneLineError, match="479"):
            in_process(*words, folder=tmp_path)
    monkeypatch.setattr(loop._Trainer, "_step", None)  # no step is left to be done
    report = in_process(*words, folder=tmp_path)["report"]
    assert report["digits"]["accuracy"] > 0.1
    assert only_result(tmp_path / "log")[1]["resumed_at"] == 3
    assert not list((own_cache / "states").iterdir()), "it is evaluated"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        # what safetensors and the folder's own files say on a full disk, which no test can be given
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
        (ConfigError("model", "cannot be written (No space left)"), "No space left"),
        (KeyboardInterrupt(), "stopped while saving the model; the same command goes on from step"),
    ],
)
def test_a_training_outlives_a_save_that_failed(failure, message, tmp_path, own_cache, monkeypatch):
    def run(name, *more):
        words = ["method=intervmerge", "method.steps=3", POOL, "modelpool.tasks=[colours,counting]"]
        in_process(*words, f"method.save_to={tmp_path / name}", *more, folder=tmp_path)
        return tmp_path / name

    undisturbed = run("undisturbed", "method.resume=never")
    with monkeypatch.context() as broken:

        def fail(*args, **kwargs):
            raise failure

        broken.setattr(InterventionModel, "save_pretrained", fail)
        with pytest.raises((OneLineError, SystemExit)) as error:
            run("saved")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "the same command goes on" in str(error.value) and not (tmp_path / "saved").exists()
    monkeypatch.setattr(loop._Trainer, "_step", None)  # no step is left to be done
    saved = run("saved")
    for file in (undisturbed / "interventions").iterdir():
        assert file.read_bytes() == (saved / "interventions" / file.name).read_bytes()
    _, result = only_result(tmp_path / "log")
    assert result["resumed_at"] == 3
    assert not list((own_cache / "states").iterdir()), "the artifact stands"


def test_agreement_is_shown_for_the_tasks_that_have_it():
    bias = {"bias_before": 1.0, "bias_after": 0.5}
    console = Console(width=120, record=True, file=io.StringIO())
    agreement = {"agreement_before": 0.25, "agreement_after": 0.75}
    console.print(diagnosis_table({"a": bias | agreement, "b": bias}))
    shown = console.export_text()
    assert shown.count("75.0%") == 2, "of the task and of the average"
    assert [line.split()[-2] for line in shown.splitlines() if " b " in line] == ["-"]


def test_the_closed_form_spends_a_budget_and_is_refined(tmp_path):
    def run(name, *more):
        words = ["method=intervmerge/closed_form", "method.budget=1000", "method.resume=never"]
        words += [POOL, "modelpool.tasks=[colours,counting]", "method.data.images=40"]
        in_process(*words, f"method.save_to={tmp_path / name}", *more, folder=tmp_path)
        return InterventionModel.from_pretrained(tmp_path / name), only_result(tmp_path / "log")[1]

    model, result = run("solved")
    assert result["extra_parameters"] == model.extra_parameters()["total"] == 7 * 129
    assert result["images_seen"] == {"colours": 40, "counting": 40} and "losses" not in result
    assert (result["method"], result["budget"]) == ("intervmerge_closed_form_b1000", 1000)
    (images,) = result["images"]
    assert images["at_most"] == 40 and images["solved"] and "steps" not in images
    assert all(row["bias_after"] < row["bias_before"] for row in result["features"].values())
    refined, result = run("refined", "method.steps=3")
    assert [refined.edits_of(t).ranks() for t in model.tasks] == [
        model.edits_of(t).ranks() for t in model.tasks
    ]
    (images,) = result["images"]
    assert images["solved"] and (images["steps"], images["batch_size"]) == (3, 16)
    assert len(result["losses"]["colours"]) == 3
    solved, trained = model.edits.state_dict(), refined.edits.state_dict()
    assert any(not torch.equal(solved[name], trained[name]) for name in solved)
