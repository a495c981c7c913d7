"""Grids of runs: what they run, that they continue, and what is made of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import synthetic_runs
import torch
from commands import COMMAND, QUIET, ROOT, compose, in_process, only, run_command
from fusion_bench.utils import instantiate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from fusion_bench_intervmerge.report import write_study
from fusion_bench_intervmerge.report.study import read_study, table
from hydra_plugins.intervmerge_sweeper import GridSweeper

TASKS = ["digits", "shapes"]
# two tasks and a few batches: what is tested here is the grid, not the numbers
SMALL = [*only(*TASKS), *QUIET, "fast_dev_run=true"]


def jobs(arguments=(), **settings):
    sweeper = GridSweeper(**settings)
    sweeper._parser = OverridesParser.create()
    return sweeper.jobs(list(arguments))


# -- which runs -----------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes_and_what_is_besides():
    found = jobs(
        axes={"form": {"a b": ["x=1", "y=2"], "c": "x=3"}, "seed": "s=0,1"},
        also={"merge": "m=none"},
        arguments=["k=v", "method.rank=4"],
    )
    for job in found[1:]:
        assert job.overrides.pop(1) == "method.rank=4"
    assert [job.overrides for job in found] == [
        ["k=v", "m=none"],
        ["k=v", "x=1", "y=2", "s=0"],
        ["k=v", "x=1", "y=2", "s=1"],
        ["k=v", "x=3", "s=0"],
        ["k=v", "x=3", "s=1"],
    ]
    assert found[1].labels == {"form": "a b", "seed": "0"}
    assert [job.folder for job in found[:3]] == [
        "also=merge", "form=a_b,seed=0", "form=a_b,seed=1",
    ]  # fmt: skip


def test_a_choice_on_the_command_line_is_an_axis_or_replaces_one():
    found = jobs(axes={"seed": "s=0,1,2"}, arguments=["s=7,8", "r=1,2"])
    assert [job.overrides for job in found] == [
        ["s=7", "r=1"], ["s=7", "r=2"], ["s=8", "r=1"], ["s=8", "r=2"],
    ]  # fmt: skip
    assert found[0].labels == {"seed": "7", "r": "1"}
    (single,) = jobs(axes={"seed": "s=0"})
    assert single.labels == {"seed": "0"}
    found = jobs(axes={"r": "r=1,2", "seed": "s=0,1,2"}, arguments=["s=7", "k=v"])
    assert [job.overrides for job in found] == [["k=v", "r=1", "s=7"], ["k=v", "r=2", "s=7"]]
    assert found[0].labels == {"r": "1", "seed": "7"}


def test_folders_are_names_whatever_varies():
    long = jobs(axes={"part": {"x" * 300: "p=1", "y" * 300: "p=2"}})
    assert all(len(job.folder) <= 120 for job in long)
    assert len({job.folder for job in long}) == 2
    (job,) = jobs(axes={"part": {"{a: [1, 2]}/../b": "p=1"}})
    assert "/" not in job.folder


def test_another_base_for_a_study_as_the_guide_writes_it():
    chosen = ["method@method.base=ties_merging"]
    beside = 'hydra.sweeper.also.references="method=intervmerge/merges"'
    whole = compose("+experiment=blocks", *chosen, beside, return_hydra_config=True)
    first, *runs = jobs(
        chosen, axes=dict(whole.hydra.sweeper.axes), also=dict(whole.hydra.sweeper.also)
    )
    assert "ties_merging" in compose("+experiment=blocks", *first.overrides).method.bases
    base = compose("+experiment=blocks", *runs[0].overrides).method.base
    assert base._target_.endswith("TiesMergingAlgorithm")


@pytest.mark.parametrize("argument", ["x=9", "x=8,9"])
def test_a_key_that_varies_with_others_is_not_for_the_command_line(argument):
    with pytest.raises(ConfigCompositionException, match=r"x: varies together.*'form'"):
        jobs(axes={"form": {"a": ["x=1", "y=2"], "b": "x=3"}}, arguments=[argument])


STUDIES = [  # the others in that folder are ways to run them
    path.stem
    for path in sorted((ROOT / "config/experiment").glob("[a-z]*.yaml"))
    if "[_study]" in path.read_text()
]


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_composes_and_all_its_runs_do(study):
    """Every override of every axis names something that is there."""
    whole = compose(f"+experiment={study}", return_hydra_config=True)
    sweeper = whole.hydra.sweeper
    assert whole.hydra.mode.name == "MULTIRUN" and sweeper.study.title
    found = jobs(axes=dict(sweeper.axes), also=dict(sweeper.also))
    assert len({job.folder for job in found}) == len(found) > 3
    settings = {job.labels.get("seed", "0"): job for job in found}
    assert set(settings) == {"0", "1", "2"}
    composed: set[str] = set()
    for job in found:
        if not composed.issuperset(job.overrides):
            composed |= set(job.overrides)
            method = compose(f"+experiment={study}", *job.overrides).method
            sites = [site for site in method.get("interventions", {}).values() if site]
            solved = any(site.get("init") == "regression" for site in sites)
            words = dict(word.split("=", 1) for word in job.overrides)
            steps = int(words.get("method.steps", 200))
            assert method.steps == steps and (steps > 0 or solved)
    quick = compose(f"+experiment=[{study},quick]", return_hydra_config=True)
    short = jobs(axes=dict(quick.hydra.sweeper.axes), also=dict(quick.hydra.sweeper.also))
    assert len(short) < len(found) and quick.method.steps == 10


def test_a_grid_without_a_finished_run_says_what_its_job_said(tmp_path):
    sweeper = GridSweeper(study={"title": "t"})
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "grid")}}})
    sweeper._unfinished = lambda job, folder: job.overrides  # composing is the command's

    class Launcher:
        def launch(self, overrides, initial_job_idx):
            return [JobReturn(status=JobStatus.FAILED, _return_value=ValueError("its own"))]

    sweeper.launcher, sweeper._parser = Launcher(), OverridesParser.create()
    with pytest.raises(ValueError, match="its own"):
        sweeper.sweep(["x=1,2"])


# -- a grid that is killed ------------------------------------------------


def test_a_killed_grid_goes_on_where_it_stopped(tmp_path):
    """2 x 2 runs in two processes, killed half-way, then the same command again, in one."""
    grid = tmp_path / "grid"
    command = [
        "-m", "hydra/sweeper=grid", "method=intervmerge", "method.seed=0,1", "method.steps=1,2",
        f"hydra.sweep.dir={grid}", *SMALL,
    ]  # fmt: skip

    def reports():
        return {path: path.stat().st_mtime_ns for path in grid.glob("*/program_report.json")}

    process = subprocess.Popen(
        [COMMAND, *command, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # joblib's workers are of its group, and are killed with it
    )
    try:
        while len(reports()) < 2:
            assert process.poll() is None, "the grid ended before it could be killed"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = reports()
    assert 2 <= len(before) < 4
    torn = next(iter(before))
    torn.write_text(torn.read_text()[:-20])
    half = read_study(grid)
    assert half.finished == len(before) - 1 < half.planned == 4

    run_command(*command, folder=tmp_path)
    after = reports()
    assert len(after) == 4 and after[torn] != before.pop(torn)
    assert {path: after[path] for path in before} == before, "a finished run was run again"
    for path in after:
        assert set(TASKS) < json.loads(path.read_text()).keys()


# -- a study --------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The quick form of a study, with its references, in two tasks."""
    cwd = tmp_path_factory.mktemp("study")
    chosen = ["hydra.sweep.dir=part_size", "method.interventions.attention.rank=2"]
    run_command("+experiment=[part_size,quick]", *chosen, *SMALL, folder=cwd)
    return cwd / "part_size"


def test_a_study_holds_what_its_runs_reported(study):
    grid = read_study(study)
    assert (grid.finished, grid.planned) == (6, 6)
    (labels, row), *_ = grid.settings()
    folder = study / "size=0.0625,seed=0"
    report = json.loads((folder / "program_report.json").read_text())
    assert labels == {"size": "0.0625", "base": "task_arithmetic"}
    assert row.mean["digits"] == report["digits"]["accuracy"]
    # 8 = 2 tasks x 6 blocks x (2 x 2 x 4 + 2) for a sixteenth of 64
    assert row.extra_parameters == 2 * 6 * (2 * 2 * 4 + 2)
    shown = table(grid)
    assert list(shown) == ["setting", *TASKS, "average", "extra parameters"] and len(shown) == 8
    assert {path.name for path in study.glob("study*")} == {
        "study.json", "study.md", "study.csv", "study.png", "study.svg", "study_2.png",
        "study_2.svg",
    }  # fmt: skip


def test_runs_of_different_tasks_stand_side_by_side(tmp_path):
    whole = compose("+experiment=many_tasks", return_hydra_config=True)
    grid = jobs(axes=dict(whole.hydra.sweeper.axes), also=whole.hydra.sweeper.also)
    assert [job.labels for job in grid] == [{"tasks": str(n)} for n in range(2, 9)]
    assert grid[0].overrides == ["modelpool.tasks=2"]
    runs = [{"folder": job.folder, **job._asdict()} for job in grid[:2]]
    index = {"study": dict(whole.hydra.sweeper.study), "jobs": runs}
    (tmp_path / "study.json").write_text(json.dumps(index))
    for job, tasks in zip(grid, (synthetic_runs.TASKS[:2], synthetic_runs.TASKS[:3]), strict=False):
        synthetic_runs.comparison(tmp_path / job.folder, tasks=tasks)
    write_study(tmp_path)
    header, *lines = (tmp_path / "study.csv").read_text().splitlines()
    assert header == "tasks,kind,base,method,average,std,seeds" and len(lines) == 2 * 6
    report = json.loads((tmp_path / grid[1].folder / "program_report.json").read_text())
    average = report["task_arithmetic"]["average"]["accuracy"]
    assert f"3,merge,task_arithmetic,,{average:.6f},,1" in lines
    assert "| model | 2 | 3 |" in (tmp_path / "study.md").read_text()


# -- what the runs of a study share ---------------------------------------


def test_coefficients_of_adamerging_are_found_once_per_pool(
    tmp_path, own_cache, caplog, monkeypatch
):
    """The second run takes the first one's; another method, or `resume: never`, does not."""
    monkeypatch.chdir(tmp_path)

    def run(name, *overrides):
        words = ["method=intervmerge/adamerging_task", "method.base.num_workers=0", *overrides]
        caplog.clear()
        model = in_process(*words, *SMALL, folder=tmp_path / name)["merged_model"]
        taken = "are those of an earlier run" in caplog.text
        return model.metadata["coefficients"]["coefficients"], taken

    caplog.set_level("INFO", logger="fusion_bench_intervmerge")
    frozen = "method.coefficients.train=false"
    first, taken = run("first", frozen)
    assert not taken and first.shape == (2,)
    second, taken = run("second", frozen)
    assert taken and torch.equal(first, second)
    assert not run("another", frozen, "method.base.lr=0.5")[1]
    assert not run("never", frozen, "method.resume=never")[1]
    (file, *_) = (own_cache / "coefficients").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    run("third", frozen)


def test_the_rivals_are_one_run_of_settings_that_are_accepted():
    config = compose("+experiment=rivals")
    comparison = instantiate(config.method)
    assert {"task_arithmetic", "iso_c", "tsv_m", "adamerging"} < set(comparison.settings.bases)
    assert {"emr_merging", "tall_masks", "wemoe", "smile"} < set(comparison.settings.rivals)
    for name in (*comparison.settings.images, *comparison.settings.labels):
        assert name in {*comparison.settings.bases, *comparison.settings.rivals}
    for name in comparison.settings.rivals:
        comparison._rival(name)
