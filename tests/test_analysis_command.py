"""Analyses through the installed command, on two tasks of the embedded pool."""

from __future__ import annotations

import csv
import json

import pytest
from commands import TINY, evaluating, in_process

from fusion_bench_intervmerge.cli import main as report
from fusion_bench_intervmerge.fusion.host import OneLineError

TASKS = ["digits", "positions"]
LEFT_OUT = [
    "calibration",
    "intervmerge_r1",
    "closed_form_rank_1",
    "calibrated_b3096",
    "calibrated_b12384",
]
POOL = [TINY[0], f"modelpool.tasks=[{','.join(TASKS)}]"]
TASK_POOL = [TINY[1], *evaluating(*TASKS)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    in_process(
        "method=intervmerge/compare",
        *(f"~method.methods.{name}" for name in LEFT_OUT),
        "method.seeds=[0]",
        "method.steps=4",
        "method.analyses=all",
        "method.analysis_images=480",  # the whole test split
        *POOL,
        *TASK_POOL,
        folder=folder,
    )
    return folder / "log"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that saved its model, as the folder of its logs."""
    folder = tmp_path_factory.mktemp("saved")
    save = "method.save_to='{log_dir}/intervmerge'"
    in_process("method=intervmerge", "method.steps=4", save, *POOL, folder=folder)
    return folder / "log"


def test_an_analysis_of_all_images_says_what_the_task_pool_says(compared):
    evaluated = json.loads((compared / "program_report.json").read_text())
    analysis = json.loads((compared / "analysis.json").read_text())
    assert (analysis["images"], analysis["split"], analysis["tasks"]) == (480, "test", TASKS)
    stitching = analysis["merges"]["task_arithmetic"]["stitching"]
    names = {"merged": "task_arithmetic"} | {
        method: f"task_arithmetic/{method}/seed0" for method in ("surgery_r16", "intervmerge_r4")
    }
    for task in TASKS:
        assert set(stitching[task]) == set(names)
        for name, evaluated_as in names.items():
            accuracy = stitching[task][name]["accuracy"]
            assert len(accuracy) == 7
            # rounding may turn one image or two
            whole = pytest.approx(evaluated[evaluated_as][task]["accuracy"], abs=2.5 / 480)
            assert accuracy[-1] == whole
            expert = evaluated["experts"][task]["accuracy"]
            assert accuracy[0] == pytest.approx(expert, abs=2.5 / 480)


def test_a_comparison_shows_its_analyses(compared, tmp_path):
    assert report(["report", str(compared), "--to", str(tmp_path)]) == 0
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"training", "closeness", "stitching", "contributions", "embeddings_tsne"} <= figures
    evaluated = json.loads((compared / "program_report.json").read_text())
    shown = f"{100 * evaluated['experts']['average']['accuracy']:.1f}"
    assert shown in (tmp_path / "table.md").read_text()


def test_a_saved_model_is_analysed_without_a_task_pool(saved, tmp_path, capfd):
    in_process(
        "method=intervmerge/analyse",
        f"method.path={saved / 'intervmerge'}",
        "method.analyses=[bias,agreement]",
        "method.images=32",
        *POOL,
        folder=tmp_path,
    )
    assert "agreement" in capfd.readouterr().out  # a table, as wide as the terminal allows
    analysis = json.loads((tmp_path / "log" / "analysis.json").read_text())
    bias = analysis["merges"]["merged"]["bias"]
    assert all(list(bias[task]) == ["merged", "intervmerge"] for task in TASKS)
    assert report(["report", str(tmp_path / "log")]) == 0
    assert (tmp_path / "log" / "report" / "closeness.png").exists()


def test_a_saved_model_is_analysed_and_evaluated(saved, tmp_path):
    result = in_process(
        "method=intervmerge/analyse",
        f"method.path={saved / 'intervmerge'}",
        "method.analyses=bias",
        "method.images=8",
        "fast_dev_run=true",
        *POOL,
        *TASK_POOL,
        folder=tmp_path,
    )["report"]
    assert set(result) == {"merged", "intervmerge"}
    assert report(["report", str(tmp_path / "log")]) == 0
    with (tmp_path / "log" / "report" / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kind"] for row in rows] == ["merge", "repair"]
    assert rows[1]["transductive"] == "True"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.analyses=[bais]"], "analyses: there is no analysis 'bais'; allowed: null, all"),
        (["method.analysis_images=0"], "analysis_images: 0; allowed: a whole number, 1 to"),
    ],
)
def test_what_cannot_be_analysed_is_said_before_anything_runs(overrides, message, tmp_path):
    with pytest.raises(OneLineError, match=r"^[^\n]*$") as error:
        in_process("method=intervmerge/compare", *overrides, *POOL, folder=tmp_path)
    assert message in str(error.value)
