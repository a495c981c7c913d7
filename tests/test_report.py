"""A report says what the runs say: the numbers, the files, and one line if a run is no run."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_runs as synthetic
from matplotlib.colors import to_rgba
from rich.console import Console

from fusion_bench_intervmerge import cli
from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.report import formatting, style
from fusion_bench_intervmerge.report.figures import draw_evaluation, draw_study
from fusion_bench_intervmerge.report.page import write_report, write_study
from fusion_bench_intervmerge.report.runs import gather, read_run
from fusion_bench_intervmerge.report.study import read_study, table
from fusion_bench_intervmerge.report.tables import to_terminal
from fusion_bench_intervmerge.results import ImagesUsed, Result, Results, in_words, parse_results

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
        }
    return synthetic.write(folder, report | changed, models, ["x", "y"])


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with losses, analyses and something that did not run."""
    folder = tmp_path_factory.mktemp("run") / "compared"
    run = synthetic.analysis(synthetic.comparison(folder, losses=True))
    edit(run / "intervmerge.json", lambda c: c.update(problems={"fisher_merging": "OSError: no"}))
    return run


@pytest.fixture(scope="module")
def written(run: Path) -> Path:
    """Its report, in a folder that has another file."""
    (run.parent / "out").mkdir()
    (run.parent / "out" / "notes.txt").write_text("mine")
    return write_report([run], run.parent / "out")


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
    (row,) = gather([run]).rows
    assert (row.base, row.method, row.seeds) == ("task_arithmetic", "intervmerge_r4", [0])
    assert row.extra_parameters == 24768 and row.transductive is False
    assert row.images.endswith("16 images per task")
    assert run.command == (
        "fusion_bench method=intervmerge method.interventions.attention.rank=4 "
        "'method.data={split: validation, fraction: 0.1}' modelpool=clip-vit-tiny_TA8"
    )
    folder = write_report([tmp_path / "run"])
    assert {path.stem for path in folder.glob("*.png")} == {
        "accuracy_by_task", "training", "features",
    }  # fmt: skip
    assert "held out" in (folder / "report.html").read_text()


def test_seeds_of_several_runs_meet_and_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    runs = [synthetic.single(tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    (row,) = gather([read_run(run) for run in [*runs, runs[0]]]).rows
    assert row.seeds == [0, 1]


def test_one_name_for_different_things_is_told_apart(tmp_path: Path) -> None:
    first = synthetic.single(tmp_path / "first", mean=0.7)
    second = synthetic.single(tmp_path / "second", mean=0.8)
    third = synthetic.single(tmp_path / "elsewhere" / "second", mean=0.75)
    rows = gather([read_run(run) for run in (first, second, third)]).rows
    assert [row.label for row in rows] == [
        "IntervMerge r=4", "IntervMerge r=4 (second-2)", "IntervMerge r=4 (second-3)",
    ]  # fmt: skip
    rows = gather([read_run(first), read_run(second)]).rows
    assert [row.method for row in rows] == ["intervmerge_r4", "intervmerge_r4@second"]


def test_a_rival_stands_below_its_merge_and_its_costs_are_shown(tmp_path: Path) -> None:
    models = {
        "base": {"kind": "merge", "base": "base", "extra_parameters": 0, "bytes": 0},
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
    heads = ["seconds", "of the experts", "bytes", "labels per task", "passes per image"]
    assert table[0].split(" | ")[-6:] == [*heads, "needs the task |"]
    # 60 %: 0.3 of 0.5
    assert table[4].split(" | ")[-5:] == ["60.0", "12k", "0", "1", "yes |"]
    assert (folder / "accuracy_vs_bytes.svg").exists()


def test_bases_can_be_chosen(tmp_path: Path) -> None:
    run = read_run(synthetic.comparison(tmp_path, bases=["task_arithmetic", "ties_merging"]))
    assert gather([run]).bases == ["task_arithmetic", "ties_merging"]
    assert gather([run], ["ties_merging"]).bases == ["ties_merging"]


def test_names_and_numbers_are_written_for_people() -> None:
    assert formatting.method("intervmerge_r4", rank=4) == "IntervMerge r=4"
    for name in ("closed_form_b6192", "closed_form_rank_1"):
        assert formatting.method(name, budget=6192) == "Closed form 6.19k"
    # a size is told, not read out of a name
    assert formatting.method("mine_r4", rank=2) == formatting.method("mine_r4") == "mine r4"
    assert formatting.readable("surgery_v2") == "SurgeryV2"
    assert formatting.readable("layer_wise_adamerging") == "layer-wise AdaMerging"
    assert formatting.readable("stanford-cars") == "stanford-cars"
    numbers = (0, 768, 24_768, 147_552, 999_950, 1_234_567)
    written = ["0", "768", "24.8k", "148k", "1M", "1.23M"]
    assert [formatting.count(number) for number in numbers] == written
    assert formatting.percent(0.7234, 0.0041) == "72.3 ± 0.4"


def test_words_are_made_of_data() -> None:
    images = ImagesUsed(split="validation", fraction=0.1, at_most=40, solved=True, seed=3)
    said = images.in_words(seed=False)
    assert images.in_words() == f"{said}, seed 3" and "10% of the validation split" in said
    new = ImagesUsed(split="test", steps=2, batch_size=16, tasks=["bees"], transductive=True)
    # of a saved model's metadata, where models of earlier versions have a sentence
    assert in_words("few") == "few"
    assert in_words(["few", new.model_dump()]) == f"few; {new.in_words()}"
    assert Result(kind="repair", images=[images, new]).transductive is True
    assert Result(kind="repair", images=[images]).transductive is False
    assert Result(kind="repair").transductive is None


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = [ImagesUsed(split="test", seed=0, transductive=True)]
    repair = Result(kind="repair", base="a", method="b", seed=0, images=images, losses={"x": [0.5]})
    results = Results(tasks=["x"], models={"a": Result(kind="merge", base="a"), "a/b": repair})
    results.write(tmp_path)
    assert parse_results(json.loads((tmp_path / "intervmerge.json").read_text()), "") == results


# -- the tables ------------------------------------------------------------------------------------


def test_csv_holds_the_means_and_the_costs(run: Path, written: Path) -> None:
    with (written / "table.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    rows = gather([read_run(run)]).rows
    assert len(lines) == len(rows) == 6
    for line, row in zip(lines, rows, strict=True):
        assert (line["base"], line["method"], line["kind"]) == (row.base, row.method, row.kind)
        assert int(line["seeds"]) == len(row.seeds)
        for task in synthetic.TASKS:
            assert float(line[task]) == pytest.approx(100 * row.mean[task], abs=0.005)
        if row.kind == "repair":
            assert float(line["average_std"]) == pytest.approx(100 * row.std["average"], abs=0.005)
            assert int(line["extra_parameters"]) == row.extra_parameters
            assert line["transductive"] == "True"


def test_markdown_is_one_table_of_methods_and_tasks(tmp_path: Path) -> None:
    lines = (write_report([small(tmp_path)]) / "table.md").read_text().splitlines()
    assert lines[0] == ("| method | x | y | average | extra parameters | gap closed | seconds |")
    assert lines[3] == (
        "| + edit r=2 | 60.0 ± 10.0 | 80.0 ± 10.0 | 70.0 ± 10.0 | 24.8k | 50% | 11 |"
    )
    assert {line.count("|") for line in lines[:5]} == {8}


def shown(table: Any, width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(console))
    return captured.get()


def test_the_terminal_shows_the_tasks_if_they_fit(run: Path) -> None:
    evaluation = gather([read_run(run)])
    narrow, wide = (shown(lambda c: to_terminal(evaluation, c), width) for width in (80, 160))
    assert "digits" not in narrow and "the written table" in narrow and narrow.count("±") == 3
    assert "digits" in wide and "…" not in narrow + wide


# -- the figures -----------------------------------------------------------------------------------


def test_a_family_has_one_colour_in_every_picture() -> None:
    palette = style.Palette([("intervmerge_r1", "a", 1), ("intervmerge_r4", "b", 4)])
    both = style.Palette([("closed_form_b9", "c", 9), ("mine", "d", 0), ("intervmerge_r4", "b", 4)])
    assert palette["intervmerge_r4"] == both["intervmerge_r4"]
    assert palette["intervmerge_r4"].colour == to_rgba(style.HUES[0])
    assert palette["intervmerge_r1"].colour == to_rgba(style.HUES[0], 0.65)
    assert both["closed_form_b9"].colour == to_rgba(style.HUES[1])
    others = {both[name].colour for name in ("mine", "of another run")}
    assert len(others) == 2 and not others & {to_rgba(hue) for hue in style.HUES}
    assert both["mine"].point["mfc"] == "none", "hollow: it has no extra parameter"
    assert "mfc" not in both["closed_form_b9"].point
    assert palette.families(palette)[-1:] == [["intervmerge_r1", "intervmerge_r4"]]


def test_figures_are_whole_files_for_light_and_dark(written: Path) -> None:
    for name in ("accuracy_vs_parameters", "accuracy_by_task", "training", *ANALYSED):
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        root = ElementTree.parse(written / f"{name}.svg").getroot()
        assert root.get("color") and "currentColor" in ElementTree.tostring(root).decode()
    assert not [path for path in written.iterdir() if path.name.startswith(".")]
    assert (written / "notes.txt").read_text() == "mine"


def test_a_legend_names_every_method_once(tmp_path: Path) -> None:
    bases = ["task_arithmetic", "ties_merging"]
    evaluation = gather([read_run(synthetic.comparison(tmp_path, bases=bases))])
    picture = next(p for p in draw_evaluation(evaluation) if p.name == "accuracy_vs_parameters")
    assert [panel.get_title("left") for panel in picture.figure.axes] == [
        "Task Arithmetic", "Ties-Merging",
    ]  # fmt: skip
    (legend,) = picture.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "the merge", "the experts", "IntervMerge r=1", "IntervMerge r=4", "Surgery r=16",
    ]  # fmt: skip


@pytest.mark.parametrize("tasks", [["only"], [f"task {i}" for i in range(20)]])
def test_one_task_or_twenty(tmp_path: Path, tasks: list[str]) -> None:
    methods = {"edit": (10, 0.3)}
    run = synthetic.comparison(tmp_path / "run", tasks=tasks, methods=methods, seeds=(0,))
    assert len(draw_evaluation(gather([read_run(run)]))) == 2


def test_every_analysed_merge_has_its_figures(tmp_path: Path) -> None:
    merges = ["task_arithmetic", "ties_merging"]
    run = synthetic.comparison(tmp_path / "run", bases=merges, methods={})
    synthetic.analysis(run, merges=[*merges, "elsewhere"], tasks=["digits"])

    def names(*bases: str) -> list[str]:
        return [picture.name for picture in draw_evaluation(gather([read], bases))][1:]

    read = read_run(run)
    assert names() == [f"{name}-{merge}" for merge in merges for name in ANALYSED]
    assert names("ties_merging") == ANALYSED


def test_tasks_without_labels_or_class_names_may_stand_beside_others(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        analysis = content["merges"]["task_arithmetic"]
        for name in ("agreement", "stitching"):
            del analysis[name]["digits"]
        for value in analysis["stitching"]["letters"].values():
            del value["accuracy"]
        for edits in analysis["contributions"]["digits"].values():
            for edit in edits:
                del edit["accuracy"], edit["agreement"]

    run = synthetic.analysis(tmp_path)
    edit(run / "analysis.json", change)
    pictures = draw_evaluation(gather([read_run(run)]))
    assert [picture.name for picture in pictures] == ANALYSED
    # bias alone; a mean and three tasks; a mean and two tasks; bias alone
    assert [len(picture.figure.axes) for picture in pictures[:4]] == [1, 4, 3, 1]
    assert pictures[2].text.startswith("Agreement")


def test_an_analysis_of_numbers_is_drawn_and_any_other_kept(tmp_path: Path) -> None:
    """As an analysis that somebody added leaves them."""
    tasks = ("digits", "letters")
    added = {
        "spread": {task: {"expert": 1.0, "merged": 0.5} for task in tasks},
        "mine": {task: {"merged": "anything"} for task in tasks},
    }
    run = synthetic.analysis(tmp_path)
    edit(run / "analysis.json", lambda content: content.update(merges={"merged": added}))
    folder = write_report([run])
    page = (folder / "report.html").read_text()
    assert Page(page).sections == ["spread", "reproduce"]
    assert "3 tasks, not evaluated by a task pool" in page
    assert not (folder / "table.md").exists()
    assert read_run(run).analysis["merged"]["mine"]["digits"] == {"merged": "anything"}


def test_a_router_has_its_confusion_drawn(tmp_path: Path) -> None:
    def change(report: Any) -> None:
        for name, own in report.items():
            if name.endswith(("seed0", "seed1")):
                own["average"] |= {"routed": 0.7}
                own["confusion"] = {
                    "digits": {"digits": 9, "none": 1},
                    "letters": {"digits": 4, "letters": 6},
                    "shapes": {},
                }

    run = synthetic.comparison(tmp_path / "run", tasks=synthetic.TASKS[:3])
    edit(run / "program_report.json", change)
    pictures = draw_evaluation(gather([read_run(run)]))
    confusion = [picture for picture in pictures if picture.name.startswith("confusion")]
    assert len(confusion) == 3 and "75.0%" in confusion[0].text
    texts = [text.get_text() for text in confusion[0].figure.axes[0].texts]
    assert [text for text in texts if text] == ["9", "1", "4", "6"]


# -- studies ---------------------------------------------------------------------------------------


def test_a_study_writes_its_table_and_figures(tmp_path: Path) -> None:
    about = {"title": "Sizes", "source": "Figure 6", "x": "size", "log": True, "by_task": True}
    sizes = ["0.0625", "0.25", "0.5", "1"]
    folder = synthetic.study(tmp_path / "study", about, {"size": sizes, "seed": ["0", "1"]})
    write_study(folder)
    text = (folder / "study.md").read_text()
    assert text.startswith("# Sizes (Figure 6): 9 of 10 runs\n")
    assert "| Experts |" in text and "| size 0.0625 |" in text
    with (folder / "study.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    repairs = [line for line in lines if line["kind"] == "repair"]
    assert [line["size"] for line in repairs] == [size for size in sizes for _ in range(2)]
    report = json.loads((folder / "size=0.5,seed=1" / "program_report.json").read_text())
    assert float(repairs[5]["digits"]) == pytest.approx(report["digits"]["accuracy"], abs=1e-6)
    assert float(repairs[5]["average"]) == pytest.approx(report["average"]["accuracy"], abs=1e-6)
    for name in ("study.png", "study.svg", "study_2.png", "study_2.svg"):
        assert (folder / name).stat().st_size > 5000
    page = (write_report([folder]) / "report.html").read_text()
    assert page.count("<h2>Sizes (Figure 6)") == 2


def test_settings_without_numbers_stand_side_by_side(tmp_path: Path) -> None:
    axes = {"method": ["IntervMerge", "Surgery"], "steps": ["10", "20"], "method.seed": ["0", "1"]}
    about = {"title": "Forms", "columns": "steps", "by_task": True}
    study = read_study(synthetic.study(tmp_path / "study", about, axes))
    # a seed is no setting, by whatever name it varies
    assert len(study.settings()) == 4
    assert study.settings()[0][0] == {
        "method": "IntervMerge", "steps": "10", "base": "task_arithmetic",
    }  # fmt: skip
    found = table(study)
    assert list(found) == ["setting", "10", "20"] and len(found) == 2
    average, gains = draw_study(study)
    assert len(average.figure.axes) == 1 and "+" in gains.figure.axes[0].texts[0].get_text()


def test_curves_join_settings_that_differ_by_their_size(tmp_path: Path) -> None:
    axes = {"method": ["Surgery r=1", "Surgery r=4", "Closed form, budget of rank 1"]}
    folder = synthetic.study(tmp_path / "study", {"x": "extra_parameters"}, axes)
    series = {name: list(rows) for name, rows in read_study(folder).series().items()}
    assert series == {"Surgery": [6192.0, 24768.0], "Closed form, budget of rank": [6192.0]}


def test_no_study_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text('{"jobs": [{"folder": "a", "labels": {}}], "study": {}}')
    with pytest.raises(ConfigError, match="no run of the grid is finished"):
        read_study(tmp_path)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"study\.json: cannot be read"):
        read_study(tmp_path)


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
    # an image in a figure is in the page itself
    local = ("#", "data:,", "data:image/png;base64,")
    assert all(load.startswith(local) for load in page.loads)
    assert not re.search(r"url\((?!['\"]?#)", text)
    assert "@import" not in text and "fetch(" not in text
    assert page.sections == [
        "results", "accuracy_vs_parameters", "accuracy_by_task", "training", *ANALYSED, "images",
        "reproduce",
    ]  # fmt: skip


def test_the_page_tells_what_was_run(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert "fusion_bench method=intervmerge/compare modelpool=clip-vit-tiny_TA8" in text
    assert "&lt;of each task&gt;" in text  # the configuration, escaped
    assert "transductive" in text and "seeds 0, 1, 2" in text
    assert re.search(r"fusion-bench-intervmerge</td><td>\d", text)
    best = re.search(r'<p class="headline">(.*?)</p>', text, re.DOTALL)
    assert best is not None and best[1].startswith("IntervMerge r=4 takes Task Arithmetic from")
    line = "Fisher Merging did not run (OSError: no)."
    assert line in text and line in (written / "table.md").read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    run = synthetic.comparison(tmp_path / "run", methods={'<b>$x_1$"': (10, 0.3)})
    text = (write_report([run], title="<i>") / "report.html").read_text()
    assert "<b>" not in text and "<i>" not in text
    assert Page(text).open == []


# -- bad input -------------------------------------------------------------------------------------


def merge_of(content: Any) -> Any:
    return content["merges"]["task_arithmetic"]


# what the error says -> the file that is changed, and how; None: it is removed
BROKEN: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "has no program_report.json": ("program_report.json", None),
    "has no intervmerge.json": ("intervmerge.json", None),
    "holds no version of the results; allowed: version 1": (
        "intervmerge.json", lambda c: c.pop("version")),
    "intervmerge.json.models.base.kind": (
        "intervmerge.json", lambda c: c["models"]["base"].update(kind="something")),
    "no 'base/edit_r2/seed1'": ("program_report.json", lambda c: c.pop("base/edit_r2/seed1")),
    "which is no share": (
        "program_report.json", lambda c: c["base"]["x"].update(accuracy=float("nan"))),
    "analysis.json: is not laid out": (
        "analysis.json", lambda c: merge_of(c).update(stitching=[1, 2])),
    "no 'features'": ("analysis.json", lambda c: merge_of(c)["bias"]["digits"]["merged"].pop(
        "features")),
    "of the same length": ("analysis.json", lambda c: merge_of(c)["stitching"]["digits"]["merged"][
        "agreement"].pop()),
    "the expert is missing": (
        "analysis.json", lambda c: [e.pop("expert") for e in merge_of(c)["embeddings"].values()]),
    "the tasks' edits differ": ("analysis.json", lambda c: merge_of(c)["contributions"]["digits"][
        "surgery_r16"][0].update(site="mlp")),
}  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("intervmerge: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_run_is_one_line_and_exit_code_2(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change = BROKEN[said]
    run = small(tmp_path / "run")
    if file == "analysis.json":
        synthetic.analysis(run, blocks=2, labels=False, tasks=synthetic.TASKS[:2])
        edit(run / "intervmerge.json", lambda c: c["models"].pop("base"))
        edit(run / "intervmerge.json", lambda c: c["models"].update(
            t={"kind": "merge", "base": "task_arithmetic"}))  # fmt: skip
        edit(run / "program_report.json", lambda c: c.update(t=c["base"]))
    if change is None:
        (run / file).unlink()
    else:
        edit(run / file, change)
    assert said in refused([str(run)], capsys)
    assert not (run / "report").exists()


def test_arguments_that_cannot_work_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(small(tmp_path / "run"))
    torn = small(tmp_path / "torn") / "program_report.json"
    torn.write_text(torn.read_text()[:-20])
    low = {"x": {"accuracy": 0.5}, "y": {"accuracy": 0.5}}
    cases = {
        "no such folder": [str(tmp_path / "nowhere")],
        "cannot be read": [str(torn.parent)],
        "its tasks are not those": [run, str(synthetic.comparison(tmp_path / "other"))],
        "average accuracy of": [run, str(small(tmp_path / "another", experts=low))],
        "no run has 'ties'": [run, "--base", "ties"],
        "cannot be written": [run, "--to", str(torn)],
    }
    for said, arguments in cases.items():
        assert said in refused(arguments, capsys)


def test_the_command_writes_beside_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    assert str(run / "report" / "report.html") in capsys.readouterr().out
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "accuracy_by_task.png", "accuracy_by_task.svg", "accuracy_vs_parameters.png",
        "accuracy_vs_parameters.svg", "report.html", "table.csv", "table.md",
    ]  # fmt: skip


def test_a_report_needs_neither_toolkit_nor_torch(tmp_path: Path) -> None:
    run = small(tmp_path / "run")
    code = (
        f"import sys; from fusion_bench_intervmerge.cli import main; main(['report', '{run}'])\n"
        "print([m for m in ('torch', 'fusion_bench', 'transformers', 'matplotlib.pyplot')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
