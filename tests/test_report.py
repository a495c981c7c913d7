"""A report says what the runs say: the numbers, the files, and one line where a run is no run."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_runs as synthetic
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from rich.console import Console

from fusion_bench_intervmerge import analysis, cli
from fusion_bench_intervmerge.report import formatting, style
from fusion_bench_intervmerge.report.figures import Picture, analyses, pictures
from fusion_bench_intervmerge.report.page import write_report
from fusion_bench_intervmerge.report.runs import Evaluation, gather, read_run
from fusion_bench_intervmerge.report.tables import to_terminal
from fusion_bench_intervmerge.results import Images, Result, Results, in_words, parse_results

ANALYSED = [
    "closeness", "bias_by_block", "stitching", "contributions", "embeddings_pca",
    "embeddings_tsne",
]  # fmt: skip


def small(folder: Path, **changed: Any) -> Path:
    """Two tasks, one merge, one repair at three seeds; the numbers are easy to do by hand."""

    def accuracy(a: float, b: float) -> dict[str, Any]:
        return {"model_info": {}, "x": {"accuracy": a}, "y": {"accuracy": b}}

    report = {
        "experts": accuracy(0.95, 0.85),
        "base": accuracy(0.4, 0.6),
        "base/edit_r2/seed0": accuracy(0.5, 0.7),
        "base/edit_r2/seed1": accuracy(0.6, 0.8),
        "base/edit_r2/seed2": accuracy(0.7, 0.9),
    }
    models: dict[str, Any] = {
        "experts": {"kind": "experts"},
        "base": {"kind": "merge", "base": "base", "extra_parameters": 0, "seconds": 0.5},
    }
    for seed in (0, 1, 2):
        models[f"base/edit_r2/seed{seed}"] = {
            "kind": "repair",
            "base": "base",
            "method": "edit_r2",
            "rank": 2,
            "seed": seed,
            "extra_parameters": 24768,
            "seconds": 10.0 + seed,
            "images": [{"split": "test", "seed": seed, "transductive": True}],
            "final_loss": 0.1,
        }
    return synthetic.write(folder, report | changed, models, ["x", "y"])


def drawn(evaluation: Evaluation, name: str, width: float = style.WIDE) -> Figure:
    """A figure by its name."""
    (picture,) = (picture for picture in pictures(evaluation) if picture.name == name)
    return picture.draw(style.Palette(evaluation.methods), width)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    run = synthetic.analysis(synthetic.comparison(tmp_path_factory.mktemp("run") / "compared"))
    return write_report([run])


@pytest.fixture(scope="module")
def small_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the small run, in a folder where another file was before."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return write_report([small(folder / "run")], folder / "out")


# -- the numbers -----------------------------------------------------------------------------------


def test_the_table_holds_what_one_computes_by_hand(tmp_path: Path) -> None:
    merge, repair, experts = gather([read_run(small(tmp_path))]).rows
    assert [row.label for row in (merge, repair, experts)] == ["base", "edit r=2", "Experts"]
    assert repair.seeds == [0, 1, 2]
    assert repair.mean["average"] == pytest.approx(0.7)
    # sample deviation of 0.6, 0.7, 0.8: sqrt((0.01 + 0 + 0.01) / 2)
    assert repair.std["average"] == pytest.approx(0.1)
    assert repair.mean["x"] == pytest.approx(0.6)
    # merge 0.5, experts 0.9: 0.1 / 0.4, 0.2 / 0.4, 0.3 / 0.4
    assert repair.values["gap_closed"].tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert repair.mean["seconds"] == pytest.approx(11)
    assert np.isnan(merge.mean["gap_closed"]) and np.isnan(merge.std["average"])


def test_without_experts_no_gap_is_claimed(tmp_path: Path) -> None:
    run = synthetic.comparison(tmp_path, references=False)
    assert all(np.isnan(row.mean["gap_closed"]) for row in gather([read_run(run)]).rows)


def test_a_single_run_is_one_row_with_its_curves(tmp_path: Path) -> None:
    run = read_run(synthetic.single(tmp_path / "run"))
    evaluation = gather([run])
    (row,) = evaluation.rows
    assert (row.base, row.method, row.seeds) == ("task_arithmetic", "intervmerge_r4", [0])
    assert row.extra_parameters == 24768
    assert row.mean["seconds"] == pytest.approx(150.6)
    assert row.transductive is False
    assert row.images.endswith("16 images a task")
    assert len(evaluation.models["losses"][0]["digits"]) == 200
    assert run.command == (
        "fusion_bench method=intervmerge method.interventions.attention.rank=4 "
        "'method.data={split: validation, fraction: 0.1}' modelpool=clip-vit-tiny_TA8"
    )
    page = (write_report([tmp_path / "run"]) / "report.html").read_text()
    assert "Training" in page and "Distance to the experts" in page and "held out" in page


def test_seeds_of_several_runs_meet_and_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    runs = [synthetic.single(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    (row,) = gather([read_run(run) for run in [*runs, runs[0]]]).rows
    assert row.seeds == [0, 1]


def test_one_name_for_different_things_is_told_apart(tmp_path: Path) -> None:
    first = synthetic.single(tmp_path / "first", mean=0.7)
    second = synthetic.single(tmp_path / "second", mean=0.8)
    third = synthetic.single(tmp_path / "elsewhere" / "second", mean=0.75)
    found = gather([read_run(run) for run in (first, second, third)]).rows
    assert [row.label for row in found] == [
        "IntervMerge r=4", "IntervMerge r=4 (second-2)", "IntervMerge r=4 (second-3)",
    ]  # fmt: skip
    found = gather([read_run(first), read_run(second)]).rows
    assert [row.method for row in found] == ["intervmerge_r4", "intervmerge_r4@second"]
    assert found[1].label == "IntervMerge r=4 (second)"


def test_a_rival_stands_below_its_merge_and_its_costs_are_shown(tmp_path: Path) -> None:
    models = {
        "base": {"kind": "merge", "base": "base", "extra_parameters": 0},
        "base/edit": {"kind": "repair", "base": "base", "method": "edit", "seed": 0},
        "base/masks": {"kind": "rival", "base": "base", "method": "masks", "bytes": 12000,
                       "labels": 0, "passes": 1.0, "needs_task": True},
        "routed": {"kind": "rival", "method": "routed", "needs_task": False},
        "experts": {"kind": "experts"},
    }  # fmt: skip
    report = {name: {"x": {"accuracy": 0.1 * i}} for i, name in enumerate(models, start=1)}
    run = synthetic.write(tmp_path / "run", report, dict(reversed(models.items())), ["x"])
    folder = write_report([run])
    table = (folder / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:7]] == [
        "| base", "| + edit", "| + masks", "| + routed", "| Experts",
    ]  # fmt: skip
    heads = ["seconds", "of the experts", "bytes", "labels a task", "passes an image"]
    assert table[0].split(" | ")[-6:] == [*heads, "needs the task |"]
    assert table[4].split(" | ")[-5] == "60.0"  # 0.3 of 0.5
    assert table[4].split(" | ")[-4:] == ["12.0k", "0", "1", "yes |"]
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert rows[2]["bytes"] == 12000 and rows[2]["needs_task"] is True


def test_methods_that_differ_by_rank_alone_are_one_family(tmp_path: Path) -> None:
    evaluation = gather([read_run(synthetic.comparison(tmp_path))])
    palette = style.Palette(evaluation.methods)
    assert palette.families(palette)[-2:] == [["intervmerge_r1", "intervmerge_r4"], ["surgery_r16"]]
    assert palette["intervmerge_r4"].colour == style.ACCENT != palette["intervmerge_r1"].colour
    assert palette["of another run"].marker not in {palette[m].marker for m in synthetic.METHODS}


def test_bases_can_be_chosen(tmp_path: Path) -> None:
    run = read_run(synthetic.comparison(tmp_path, bases=["task_arithmetic", "ties_merging"]))
    assert gather([run]).bases == ["task_arithmetic", "ties_merging"]
    assert gather([run], ["ties_merging"]).bases == ["ties_merging"]


def test_names_and_numbers_are_written_for_people() -> None:
    assert formatting.method("intervmerge_r4", rank=4) == "IntervMerge r=4"
    for name in ("closed_form_b6192", "closed_form_rank_1"):
        assert formatting.method(name, budget=6192) == "Closed form 6.2k"
    # a size is told, not read out of a name
    assert formatting.method("mine_r4", rank=2) == formatting.method("mine_r4") == "mine r4"
    assert formatting.readable("surgery_v2") == "SurgeryV2"
    assert formatting.readable("layer_wise_adamerging") == "layer-wise AdaMerging"
    assert formatting.readable("stanford-cars") == "stanford-cars"
    numbers = (768, 6144, 24_768, 147_552, 999_950, 1_234_567)
    assert [formatting.count(n) for n in numbers] == [
        "768",
        "6.1k",
        "24.8k",
        "148k",
        "1.0M",
        "1.2M",
    ]
    assert formatting.percent(0.7234, 0.0041) == "72.3 ± 0.4"


def test_words_are_made_of_data() -> None:
    images = Images(split="validation", fraction=0.1, at_most=40, solved=True, seed=3)
    said = (
        "10% of the validation split, at most 40 images a task, unlabelled, solved in closed form"
    )
    assert images.in_words() == f"{said}, seed 3" and images.in_words(seed=False) == said
    new = Images(split="test", steps=2, batch_size=16, tasks=["bees"], transductive=True)
    how = "bees: 100% of the test split, unlabelled, 2 steps of 16 images a task"
    assert new.in_words() == how
    # of a saved model's metadata, where models of earlier versions have a sentence
    assert in_words("few") == "few" and in_words(["few", new.model_dump()]) == f"few; {how}"
    assert Result(kind="repair", images=[images, new]).transductive is True
    assert Result(kind="repair", images=[images]).transductive is False
    assert Result(kind="repair").transductive is None


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = [Images(split="test", seed=0, transductive=True)]
    repair = Result(kind="repair", base="a", method="b", seed=0, images=images, losses={"x": [0.5]})
    results = Results(tasks=["x"], models={"a": Result(kind="merge", base="a"), "a/b": repair})
    results.write(tmp_path)
    assert parse_results(json.loads((tmp_path / "intervmerge.json").read_text()), "") == results


# -- the files -------------------------------------------------------------------------------------


def test_json_keeps_every_seed_unrounded(small_report: Path) -> None:
    found = json.loads((small_report / "table.json").read_text())
    assert found["tasks"] == ["x", "y"]
    repair = found["rows"][1]
    assert repair["seeds"] == [0, 1, 2]
    assert repair["accuracy"]["x"]["by_seed"] == [0.5, 0.6, 0.7]
    assert repair["gap_closed"]["mean"] == pytest.approx(0.5)
    assert repair["extra_parameters"] == 24768 and repair["transductive"] is True


def test_csv_round_trips(written: Path) -> None:
    with (written / "table.csv").open(newline="") as stream:
        read = list(csv.DictReader(stream))
    exact = json.loads((written / "table.json").read_text())["rows"]
    assert len(read) == len(exact) == 6
    for line, row in zip(read, exact, strict=True):
        assert (line["base"] or None, line["method"] or None) == (row["base"], row["method"])
        assert int(line["seeds"]) == len(row["seeds"])
        for task in synthetic.TASKS:
            assert float(line[task]) == pytest.approx(
                100 * row["accuracy"][task]["mean"], abs=0.005
            )
        if row["average"]["std"] is not None:
            assert float(line["average_std"]) == pytest.approx(
                100 * row["average"]["std"], abs=0.005
            )
        if row["extra_parameters"] is not None:
            assert int(line["extra_parameters"]) == row["extra_parameters"]


def test_markdown_is_one_table_of_methods_and_tasks(small_report: Path) -> None:
    lines = (small_report / "table.md").read_text().splitlines()
    assert lines[0] == ("| method | x | y | average | extra parameters | gap closed | seconds |")
    assert lines[3] == (
        "| + edit r=2 | 60.0 ± 10.0 | 80.0 ± 10.0 | 70.0 ± 10.0 | 24.8k | 50% | 11 |"
    )
    assert {line.count("|") for line in lines[:5]} == {8}


def test_the_terminal_shows_as_much_as_fits(tmp_path: Path) -> None:
    evaluation = gather([read_run(synthetic.comparison(tmp_path))])
    shown = {}
    for width in (80, 150, 200):
        console = Console(width=width)
        with console.capture() as captured:
            console.print(to_terminal(evaluation, console))
        shown[width] = captured.get()
        assert "…" not in shown[width]
    assert "digits" not in shown[80] and "the written table" in shown[80]
    assert "digits" in shown[150] and shown[150].count("±") == 3
    assert shown[200].count("±") == 27


def test_figures_are_whole_files(written: Path) -> None:
    for name in ("accuracy_vs_parameters", "accuracy_by_task", *ANALYSED):
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(written / f"{name}.svg")
    assert not [path for path in written.iterdir() if path.name.startswith(".")]


def test_labels_of_a_figure_do_not_touch(tmp_path: Path) -> None:
    methods = {
        **synthetic.METHODS,
        "intervmerge_r16": (98688, 0.52),
        "surgery_r64": (65536, 0.34),
        "surgery_v2_r16": (212992, 0.55),
        "intervmerge_mini_r1": (2048, 0.22),
    }
    evaluation = gather([read_run(synthetic.comparison(tmp_path, methods=methods))])
    for width in (style.WIDE, style.NARROW):
        figure = drawn(evaluation, "parameters", width)
        figure.draw_without_rendering()
        (panel,) = figure.axes
        labels = [found.offsetbox for found in panel.findobj(AnnotationBbox)]
        assert len(labels) == len(methods)
        boxes = [found.get_window_extent() for found in [*panel.texts, *labels]]
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        frame = figure.bbox
        assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)


@pytest.mark.parametrize("tasks", [["only"], [f"task {i}" for i in range(20)]])
def test_one_task_or_twenty(tmp_path: Path, tasks: list[str]) -> None:
    run = synthetic.comparison(
        tmp_path / "run", tasks=tasks, methods={"edit": (10, 0.3)}, seeds=(0,), losses=True
    )
    assert (write_report([run]) / "report.html").exists()


def test_other_files_of_the_folder_stay(small_report: Path) -> None:
    assert (small_report / "notes.txt").read_text() == "mine"
    assert not (small_report.parent / "run" / "report").exists()


def test_many_points_are_told_apart_by_a_legend(tmp_path: Path) -> None:
    """Five panels beside each other have no room for a label at every point."""
    evaluation = gather([read_run(synthetic.comparison(tmp_path, bases=list(synthetic.MERGES)))])
    for width in (style.WIDE, style.NARROW):
        figure = drawn(evaluation, "parameters", width)
        assert len(figure.axes) == 5
        (legend,) = figure.legends
        shown = [text.get_text() for text in legend.get_texts()]
        assert shown == ["IntervMerge r=1", "IntervMerge r=4", "Surgery r=16"]
        for panel in figure.axes:
            boxes = [text.get_window_extent() for text in panel.texts]
            assert len(boxes) == 2  # the merge and the experts
            assert not boxes[0].overlaps(boxes[1])


# -- analyses --------------------------------------------------------------------------------------


def test_every_analysed_merge_has_its_figures(tmp_path: Path) -> None:
    merges = ["task_arithmetic", "ties_merging"]
    run = synthetic.comparison(tmp_path / "run", bases=merges)
    synthetic.analysis(run, merges=[*merges, "elsewhere"])

    def names(*bases: str) -> list[str]:
        return [picture.name for picture in analyses.pictures(gather([read], bases))]

    read = read_run(run)
    assert names() == [f"{name}-{merge}" for merge in merges for name in ANALYSED]
    assert names("ties_merging") == ANALYSED


def test_what_no_task_pool_evaluated_is_shown_without_a_table(tmp_path: Path) -> None:
    folder = write_report([synthetic.analysis(tmp_path, labels=False, merges=["merged"])])
    text = (folder / "report.html").read_text()
    assert Page(text).sections == [*ANALYSED, "reproduce"]
    assert "3 tasks, not evaluated by a task pool" in text
    assert "Agreement with the expert&#39;s predictions of a network" in text
    assert not (folder / "table.md").exists()


def test_tasks_without_labels_or_class_names_may_stand_beside_others(tmp_path: Path) -> None:
    run = synthetic.analysis(tmp_path)
    found = json.loads((run / "analysis.json").read_text())
    analysis = found["merges"]["task_arithmetic"]
    for name in ("agreement", "stitching"):
        del analysis[name]["digits"]
    for value in analysis["stitching"]["letters"].values():
        del value["accuracy"]
    for edits in analysis["contributions"]["digits"].values():
        for edit in edits:
            del edit["accuracy"], edit["agreement"]
    (run / "analysis.json").write_text(json.dumps(found))
    evaluation = gather([read_run(run)])
    shown: dict[str, Picture] = {p.name: p for p in analyses.pictures(evaluation)}
    assert list(shown) == ANALYSED
    counted = {name: len(drawn(evaluation, name).axes) for name in ANALYSED[:4]}
    # bias alone; a mean and three tasks; a mean and two tasks; bias alone
    assert counted == {"closeness": 1, "bias_by_block": 4, "stitching": 3, "contributions": 1}
    assert shown["stitching"].text.startswith("Agreement")


def test_a_plugins_analysis_is_kept_and_not_drawn(tmp_path: Path) -> None:
    run = synthetic.analysis(tmp_path)
    found = json.loads((run / "analysis.json").read_text())
    found["merges"]["task_arithmetic"] = {"mine": {"digits": {"merged": "anything"}}}
    (run / "analysis.json").write_text(json.dumps(found))
    assert read_run(run).analysis["task_arithmetic"]["mine"]["digits"] == {"merged": "anything"}
    assert Page((write_report([run]) / "report.html").read_text()).sections == ["reproduce"]


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page would load, its ids, and whether its elements are closed."""

    VOID = {"meta", "link", "br", "img", "input", "hr", "col"}  # noqa: RUF012

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.sections: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if given.get(name):
                self.loads.append(given[name] or "")
        if given.get("id"):
            self.ids.append(given["id"] or "")
        if tag == "section":
            self.sections.append(given["id"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(load.startswith("#") or load == "data:," for load in page.loads)
    assert not re.search(r"url\((?!['\"]?#)", text)
    assert "@import" not in text and "fetch(" not in text
    assert page.sections == [
        "results", "parameters", "tasks", *ANALYSED, "images", "reproduce",
    ]  # fmt: skip


def test_the_page_tells_what_was_run(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "fusion_bench method=intervmerge/compare modelpool=clip-vit-tiny_TA8" in text
    assert "&lt;of each task&gt;" in text  # the configuration, escaped
    assert "transductive" in text and "seeds 0, 1 and 2" in text
    assert re.search(r"fusion-bench-intervmerge</td><td>\d", text)
    best = re.search(r'<p class="headline">(.*?)</p>', text, re.DOTALL)
    assert best is not None and best[1].startswith("IntervMerge r=4 takes Task Arithmetic from")


def test_inline_figures_take_the_pages_colours(written: Path) -> None:
    text = (written / "report.html").read_text()
    svg = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--ink)" in svg and "var(--hue-0)" in svg
    inks = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg))
    assert inks == set()


def test_names_are_escaped(tmp_path: Path) -> None:
    run = synthetic.comparison(tmp_path / "run", methods={'<b>$x_1$"': (10, 0.3)})
    text = (write_report([run], title="<i>") / "report.html").read_text()
    assert "<b>" not in text and "<i>" not in text
    assert Page(text).open == []


# -- bad input -------------------------------------------------------------------------------------


def broken(tmp_path: Path, name: str) -> list[str]:
    """Arguments of ``intervmerge report`` that cannot work."""
    run = tmp_path / "run"
    if name == "no such folder":
        return [str(tmp_path / "nowhere")]
    small(run)
    report = run / "program_report.json"
    if name == f"has no {report.name}":
        report.unlink()
    elif name == "broken JSON":
        report.write_text('{"a": ')
    elif name == "has no intervmerge.json":
        (run / "intervmerge.json").unlink()
    elif name == "holds no version of the results; allowed: version 1":
        (run / "intervmerge.json").write_text('{"losses": {}}')
    elif name == "intervmerge.json.models.base.kind":
        found = json.loads((run / "intervmerge.json").read_text())
        found["models"]["base"]["kind"] = "something"
        (run / "intervmerge.json").write_text(json.dumps(found))
    elif name == "no 'base/edit_r2/seed1'":
        found = json.loads(report.read_text())
        del found["base/edit_r2/seed1"]
        report.write_text(json.dumps(found))
    elif name == "which is no share":
        small(run, base={"x": {"accuracy": float("nan")}, "y": {"accuracy": 0.5}})
    elif name == "its tasks are not those":
        return [str(run), str(synthetic.comparison(tmp_path / "other"))]
    elif name == "average accuracy of":
        other = {"x": {"accuracy": 0.5}, "y": {"accuracy": 0.5}}
        return [str(run), str(small(tmp_path / "other", experts=other))]
    elif name == "no run has 'ties'":
        return [str(run), "--base", "ties"]
    elif name == "cannot be written":
        (tmp_path / "file").write_text("")
        return [str(run), "--to", str(tmp_path / "file")]
    elif name == "analysis.json: is not laid out":
        (run / "analysis.json").write_text('{"merges": {"a": {"stitching": [1, 2]}}}')
    elif name in ANALYSES_THAT_ARE_NONE:
        found = json.loads((synthetic.analysis(run) / "analysis.json").read_text())
        ANALYSES_THAT_ARE_NONE[name](found["merges"]["task_arithmetic"])
        (run / "analysis.json").write_text(json.dumps(found))
    return [str(run)]


ANALYSES_THAT_ARE_NONE = {
    "no 'features'": lambda found: found["bias"]["digits"]["merged"].pop("features"),
    "bias: the tasks' encoders differ": lambda found: found["bias"]["digits"].pop("merged"),
    "of the same length": lambda found: found["stitching"]["digits"]["merged"]["agreement"].pop(),
    "not finite": lambda found: found["agreement"]["digits"].update(merged=float("nan")),
    "the expert is missing": lambda found: [e.pop("expert") for e in found["embeddings"].values()],
    "the tasks' edits differ": lambda found: found["contributions"]["digits"]["surgery_r16"][
        0
    ].update(site="mlp"),
}


@pytest.mark.parametrize(
    "said",
    [
        "no such folder",
        "has no program_report.json",
        "broken JSON",
        "has no intervmerge.json",
        "holds no version of the results; allowed: version 1",
        "intervmerge.json.models.base.kind",
        "no 'base/edit_r2/seed1'",
        "which is no share",
        "its tasks are not those",
        "average accuracy of",
        "no run has 'ties'",
        "cannot be written",
        "analysis.json: is not laid out",
        *ANALYSES_THAT_ARE_NONE,
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = broken(tmp_path, said)
    assert cli.main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err and err.startswith("intervmerge: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "report").exists()


def test_the_command_writes_beside_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    assert str(run / "report" / "report.html") in capsys.readouterr().out
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "accuracy_by_task.png", "accuracy_by_task.svg", "accuracy_vs_parameters.png",
        "accuracy_vs_parameters.svg", "report.html", "table.csv", "table.json", "table.md",
    ]  # fmt: skip


def test_an_analysis_with_its_figure_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guide's own example, put beside the others."""
    guide = Path(__file__).parents[1] / "docs" / "extending.md"
    example = re.search(r"```python\n(\"\"\"Spread.*?)```", guide.read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "spread.py").write_text(example[1])
    monkeypatch.setattr(analysis, "__path__", [*analysis.__path__, str(tmp_path)])
    monkeypatch.setattr(analysis, "ANALYSES", (*analysis.ANALYSES, "spread"))
    run = synthetic.analysis(tmp_path / "run")
    found = json.loads((run / "analysis.json").read_text())
    spread = {task: {"expert": 1.0, "merged": 0.5} for task in ("digits", "letters")}
    found["merges"]["task_arithmetic"]["spread"] = spread
    (run / "analysis.json").write_text(json.dumps(found))
    page = (write_report([run]) / "report.html").read_text()
    assert Page(page).sections == [*ANALYSED, "spread", "reproduce"]
    assert "The mean standard deviation of a feature" in page


def test_a_report_needs_neither_toolkit_nor_torch(tmp_path: Path) -> None:
    run = synthetic.analysis(synthetic.comparison(tmp_path / "run", losses=True))
    code = (
        f"import sys; from fusion_bench_intervmerge.cli import main; main(['report', '{run}'])\n"
        "print([m for m in ('torch', 'fusion_bench', 'transformers', 'matplotlib.pyplot')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_router_has_its_confusion_drawn(tmp_path: Path) -> None:
    run = synthetic.comparison(tmp_path / "run", tasks=synthetic.TASKS[:3])
    file = run / "program_report.json"
    report = json.loads(file.read_text())
    told = {
        "digits": {"digits": 9, "none": 1},
        "letters": {"digits": 4, "letters": 6},
        "shapes": {},
    }
    for name, own in report.items():
        if name.endswith(("seed0", "seed1")):
            own["average"] |= {"routed": 0.7}
            own["confusion"] = told
    file.write_text(json.dumps(report))
    found = [p for p in pictures(gather([read_run(run)])) if p.name.startswith("confusion")]
    seeds = sum(name.endswith("seed0") for name in report)
    assert len(found) == min(seeds, 3) and "75.0%" in found[0].text
    evaluation = gather([read_run(run)])
    for width in (style.WIDE, style.NARROW):
        figure = found[0].draw(style.Palette(evaluation.methods), width)
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts == ["9", "1", "4", "6"]


def test_what_did_not_run_says_why(tmp_path: Path) -> None:
    run = synthetic.comparison(tmp_path / "run")
    path = run / "intervmerge.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"problems": {"fisher_merging": "OSError: no room"}}))
    write_report([run], tmp_path / "report")
    line = "Fisher Merging did not run (OSError: no room)."
    assert line in (tmp_path / "report" / "table.md").read_text()
    assert line in (tmp_path / "report" / "report.html").read_text()
