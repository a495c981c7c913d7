"""``+experiment=published``: its pools, its estimate, a killed run, and the published numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
from commands import COMMAND, QUIET, compose, in_process
from fusion_bench.utils import instantiate
from loopback_hub import address, serve
from published_hub import TASKS, fill
from transformers import CLIPConfig

from fusion_bench_intervmerge.cli import main
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.fusion.published import (
    SOLVED,
    TRAINED,
    estimate,
    model_pool,
    passes,
    task_pool,
)
from fusion_bench_intervmerge.report.answers import read_answers
from fusion_bench_intervmerge.report.published import Found, compare, published, read_found

BASES = [
    "task_arithmetic", "weight_averaging", "ties_merging", "adamerging_task", "adamerging",
    "tsv_m", "iso_c",
]  # fmt: skip
METHODS = [
    "surgery_r16", "surgery_v2_r16", "intervmerge_r1", "intervmerge_r4", "intervmerge_r16",
    "intervmerge_mini", "closed_form_rank_1", "closed_form_rank_4", "calibration", "featcal",
]  # fmt: skip


@pytest.mark.parametrize("checkpoints", ["fusion_bench", "openclip"])
@pytest.mark.parametrize("tasks", [8, 14, 20])
@pytest.mark.parametrize("size", ["b32", "b16", "l14"])
def test_every_choice_has_pools(size, tasks, checkpoints):
    choice = {"size": size, "tasks": tasks, "checkpoints": checkpoints}
    if checkpoints == "openclip" and tasks != 8:
        for pool in (model_pool, task_pool):
            with pytest.raises(ConfigError, match=f"tasks: {tasks}, but openclip .* of 8; .*: 8"):
                pool(**choice)
        return
    models, tested = model_pool(**choice), task_pool(**choice)
    assert len(models.model_names) == tasks
    assert list(tested._test_datasets) == list(models._test_datasets) == models.model_names
    patch = {"b32": "32", "b16": "16", "l14": "14"}[size]
    assert patch in str(models._models["_pretrained_"])
    assert "ylecun/mnist" in str(tested._test_datasets)
    assert set(models.model_names) <= set(published()[1])


def test_what_a_run_takes_is_counted(tmp_path):
    """By hand: one merge, one repair that is trained on it and one that is solved."""
    words = ["size=b32", "tasks=8", f"path.log_dir={tmp_path}"]
    method = instantiate(compose("+experiment=published", *words).method)
    assert list(method.settings.bases) == BASES and list(method.settings.methods) == METHODS
    everything = [method._build(name).settings for name in method.settings.methods]
    assert "3.4 GB of checkpoints" in estimate(method.settings, everything)[0]
    one = {"bases": {"task_arithmetic": method.settings.bases["task_arithmetic"]}}
    repairs = [method._build(name).settings for name in ("intervmerge_r1", "closed_form_rank_1")]
    tested = 19850 + 8041 + 6300 + 2700 + 26032 + 12630 + 10000 + 1880
    by_hand = 5 * tested + 8 * (1000 * 16 * TRAINED + 512 * SOLVED)
    assert passes(method.settings.model_copy(update=one), repairs) == by_hand


def test_the_published_numbers_agree_with_their_averages():
    tables, _ = published()
    for table in tables:
        for name, row in table.rows.items():
            if isinstance(row, list):
                assert len(row) == 9 and abs(sum(row[:8]) / 8 - row[8]) < 0.3, (table.source, name)
    known = {base for table in tables for base in table.rows if "/" not in base}
    assert known == {"pretrained", "experts", *BASES} - {"tsv_m", "iso_c"}


# -- a file and the table ------------------------------------------------------------------------


def found(checkpoints="fusion_bench", **accuracies):
    models = {name: {"accuracy": {"a": value, "b": value}} for name, value in accuracies.items()}
    return Found(checkpoints=checkpoints, models=models, problems={"iso_c": "no memory"})


def test_ours_stand_beside_the_published_of_the_same_checkpoints_first():
    repair = "task_arithmetic/intervmerge_r1"
    both = {"task_arithmetic": 0.7, f"{repair}/seed0": 0.85, f"{repair}/seed1": 0.87, "iso_c": 0.5}
    stock, theirs = compare(found(**both)), compare(found("openclip", **both))
    assert stock["published"].tolist()[:3] == [68.0, 67.55, 85.47]
    assert stock["same"].tolist() == [True, True, False, None]
    assert theirs["published"].tolist()[:2] == [69.1, 85.47] and theirs["same"].tolist()[1]
    assert stock["ours"].tolist() == pytest.approx([70, 70, 86, 50])
    assert pd.isna(stock["published"]).tolist() == [False, False, False, True]


def test_the_command_compares_a_file(tmp_path, capsys):
    (tmp_path / "published.json").write_text(json.dumps(found(task_arithmetic=0.7).to_dict()))
    assert main(["published", str(tmp_path), str(tmp_path / "published.json")]) == 0
    said = capsys.readouterr().out
    assert said.count("68.0") == 2 and "+2.0" in said and "+2.5" in said
    assert "FeatCal's released demo" in said and "iso_c did not run: no memory" in said
    for text, reason in (("{", "cannot be read"), ('{"size": "b64"}', "size: 'b64'; allowed: b32")):
        (tmp_path / "published.json").write_text(text)
        assert main(["published", str(tmp_path)]) == 2
        assert reason in capsys.readouterr().err


# -- the whole run -------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Three blocks, 64 wide, under ViT-B/32's names: its own weights are 3.4 GB."""
    sizes = {"num_attention_heads": 2, "projection_dim": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    vision |= {"image_size": 32, "patch_size": 8}
    with serve(tmp_path / "hub") as hub:
        fill(hub, CLIPConfig(text | sizes, vision | sizes, projection_dim=16), 4)
        address(hub, tmp_path / "home", monkeypatch)
        yield hub


def test_a_killed_run_goes_on_and_ends_with_the_table(hub, tmp_path, capfd):
    chosen = ("surgery_r16", "calibration")
    words = [
        "+experiment=published", *QUIET, "method.steps=2", "method.references=false",
        "+taskpool.dataloader_kwargs.num_workers=0",
        *(f"~method.bases.{base}" for base in BASES if base != "task_arithmetic"),
        *(f"~method.methods.{name}" for name in METHODS if name not in chosen),
        "~method.coefficients", "~method.train_coefficients", "~method.images",
        "+method.bases.broken={_target_: nowhere.Method}",
    ]  # fmt: skip
    log = tmp_path / "log"
    process = subprocess.Popen(
        [COMMAND, *words, f"path.log_dir={log}"],
        cwd=tmp_path,
        env=os.environ
        | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def kept():
        return {path: path.stat().st_mtime_ns for path in log.glob("models/*/**/*.json")}

    try:
        while not kept():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = kept()
    assert not (log / "published.json").exists() and len(before) < 4

    report = in_process(*words, folder=tmp_path)["report"]
    assert {path: kept()[path] for path in before} == before, "a finished repair was made again"
    repairs = [f"task_arithmetic/{name}" for name in ("surgery_r16/seed0", "calibration")]
    assert list(report) == ["task_arithmetic", *repairs]
    assert set(read_answers(log).models) == set(report), "what the killed run answered is lost"
    said = capfd.readouterr().out
    assert "3.4 GB of checkpoints" in said and "one NVIDIA H200" in said
    ours = read_found(log)
    assert list(ours.models) == list(report)
    assert {t: ours.models["task_arithmetic"].accuracy[t] for t in TASKS} == {
        task: report["task_arithmetic"][task]["accuracy"] for task in TASKS
    }
    assert list(ours.problems) == ["broken"] and "nowhere" in ours.problems["broken"]
    assert ours.models["task_arithmetic/surgery_r16/seed0"].transductive
    assert not ours.models["task_arithmetic/calibration"].transductive
