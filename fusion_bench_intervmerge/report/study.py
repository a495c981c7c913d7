"""A study: a grid of runs that differ along named axes, as one table and one figure.

The grid's sweeper (``hydra/sweeper=grid``) leaves ``study.json`` in the sweep's folder: what is
studied, and of every run its folder and its labels.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..files import write_files
from . import tables
from .drawing import to_png, to_svg
from .figures import WIDE
from .runs import REPORT, Result, Run, Study, gather, read_run
from .study_figures import Draw, draw
from .tables import Row
from .words import NONE, count, percent, readable

INDEX = "study.json"
_ALONE = ("seed", "also")  # axes that do not tell one setting from another


@dataclass(frozen=True)
class Grid:
    """A grid of runs, finished or half-finished.

    Attributes:
        about: ``title``, ``source`` (of the paper), ``x``: the axis whose labels are numbers, or
            ``extra_parameters``; without it the settings stand side by side. ``xlabel``, ``log``
            and ``by_task`` (a panel a task) shape the figure, ``columns`` names an axis that
            stands across the table.
        study: all results, in the order of the grid; ``method`` is a setting's name.
        rows: one a model, see ``tables.rows``.
        labels: a setting's name -> axis -> label.
        finished, planned: number of runs.
    """

    about: dict[str, Any]
    study: Study
    rows: list[Row]
    labels: dict[str, dict[str, str]]
    finished: int
    planned: int

    def settings(self) -> list[tuple[dict[str, str], Row]]:
        """The grid's settings over their seeds: labels (the base's too) and results."""
        return [
            ({**self.labels[r.method or ""], "base": r.base or ""}, r)
            for r in self.rows
            if r.kind == "repair"
        ]

    def reference(self, kind: str, base: str | None = None) -> Row | None:
        """The row of the experts, the pretrained encoder, or a merge."""
        return next((r for r in self.rows if (r.kind, r.base) == (kind, base)), None)


def is_study(folder: str | Path) -> bool:
    """Whether a grid was run there."""
    return (Path(folder) / INDEX).is_file()


def read_study(folder: str | Path) -> Grid:
    """Read what is finished of a grid.

    Raises:
        ConfigError: no run is finished, or what is there does not fit together.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        jobs = [(str(job["folder"]), dict(job["labels"])) for job in index["jobs"]]
        about = {"title": folder.name, **(index["study"] or {})}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            str(folder / INDEX), f"cannot be read ({reason})", "the folder of a grid of runs"
        ) from None
    runs, labels = [], {}
    for name, job_labels in jobs:
        if not _finished(folder / name / REPORT):
            continue
        run = read_run(folder / name)
        if "also" in job_labels:
            runs.append(run)
            continue
        setting = {a: v for a, v in job_labels.items() if a.rpartition(".")[2] not in _ALONE}
        method = setting_name({a: v for a, v in setting.items() if a != "base"}) or "repair"
        labels[method] = {axis: label for axis, label in setting.items() if axis != "base"}
        runs.append(_renamed(run, method, setting.get("base")))
    if not runs:
        raise ConfigError(str(folder), "no run of the grid is finished", f"{len(jobs)} runs")
    study = gather(runs)
    return Grid(about, study, tables.rows(study), labels, len(runs), len(jobs))


def _finished(report: Path) -> bool:
    """Whether a run's report is there, and whole: FusionBench may be killed as it writes it."""
    try:
        json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def write_study(folder: str | Path, console: Console | None = None) -> None:
    """Write ``study.md``, ``study.csv``, ``study.png`` and ``study.svg`` beside the runs.

    Raises:
        ConfigError: as ``read_study``; or the folder cannot be written to.
    """
    grid = read_study(folder)
    head, lines = table(grid)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(_for_programs(grid))
    content: dict[str, str | bytes] = {
        "study.md": to_markdown(grid, head, lines),
        "study.csv": stream.getvalue(),
    }
    for number, make in enumerate(drawings(grid)):
        name = "study" if number == 0 else f"study_{number + 1}"
        figure = make(WIDE)
        content[f"{name}.png"], content[f"{name}.svg"] = to_png(figure), to_svg(figure)
    write_files(Path(folder), content)
    console = console or Console()
    console.print(title(grid), style="bold")
    if not grid.about.get("columns"):
        console.print(tables.to_terminal(grid.study, grid.rows, console.width))
    else:
        shown = Table()
        for i, name in enumerate(head):
            shown.add_column(name, justify="right" if i else "left")
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
    console.print(f"Table and figure: {Path(folder) / 'study.md'}, study.png", soft_wrap=True)


def setting_name(labels: Mapping[str, str]) -> str:
    """A setting for people: labels that say nothing alone, as numbers, follow their axis' name."""
    return ", ".join(
        label if label[:1].isalpha() else f"{axis.rpartition('.')[2]} {label}"
        for axis, label in labels.items()
    )


def drawings(grid: Grid) -> list[Draw]:
    """The study's figures, for any width in inches."""
    return draw(grid.about, grid.settings(), grid.reference)


def title(grid: Grid) -> str:
    """What was studied, and how much of it is there."""
    source = f" ({grid.about['source']})" if grid.about.get("source") else ""
    half = grid.finished < grid.planned
    return f"{grid.about['title']}{source}" + (
        f": {grid.finished} of {grid.planned} runs" if half else ""
    )


def table(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """The study for people: column heads, and lines of cells."""
    return _across(grid) if grid.about.get("columns") else _down(grid)


def to_markdown(grid: Grid, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table with its heading and what its numbers are."""
    rule = "|" + " --- |" + " ---: |" * (len(head) - 1)
    body = ["| " + " | ".join(cells) + " |" for cells in [head, *lines]]
    repairs = [row for row in grid.rows if row.kind == "repair"]
    images = sorted({row.images_used for row in repairs if row.images_used})
    transductive = any(row.transductive for row in repairs)
    text = tables.caption(grid.rows).split(" Gap closed")[0]
    text += f" Edits were found on {'; or '.join(images)}." if len(images) < 4 else ""
    text += " Transductive: these are images of the test split." if transductive else ""
    return "\n".join([f"# {title(grid)}", "", body[0], rule, *body[1:], "", text, ""])


def _down(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """Settings down, tasks across."""
    several = len(grid.study.bases) > 1
    head = [*(["merge"] if several else []), "setting", *grid.study.tasks, "average"]
    lines = []
    for row in grid.rows:
        name = row.method if row.kind == "repair" else readable(row.base or row.kind)
        stats = [*row.accuracy.values(), row.average]
        extra = NONE if row.extra_parameters is None else count(row.extra_parameters)
        cells = [readable(row.base)] if several and row.base else [""] * several
        lines.append([*cells, name or "", *(percent(s.mean, s.std) for s in stats), extra])
    return [*head, "extra parameters"], lines


def _across(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """Averages: the labels of one axis across, the others down."""
    axis = grid.about["columns"]
    settings = grid.settings()
    columns = list(dict.fromkeys(labels[axis] for labels, _ in settings))
    lines: dict[str, dict[str, str]] = {}
    if axis == "base":
        merges = {c: grid.reference("merge", c) for c in columns}
        lines["merge alone"] = {c: percent(r.average.mean) for c, r in merges.items() if r}
    for labels, row in settings:
        name = setting_name({a: v for a, v in labels.items() if a not in (axis, "base")})
        shown = percent(row.average.mean, row.average.std)
        lines.setdefault(name, {})[labels[axis]] = shown
    head = ["setting", *(readable(c) for c in columns)]
    return head, [[name, *(cells.get(c, NONE) for c in columns)] for name, cells in lines.items()]


def _for_programs(grid: Grid) -> list[list[Any]]:
    """Every run's own numbers: one line a model and seed."""
    axes = list(dict.fromkeys(axis for labels in grid.labels.values() for axis in labels))
    head = ["kind", "base", *axes, "seed", "extra_parameters", *grid.study.tasks, "average"]
    lines: list[list[Any]] = [head]
    for result in grid.study.results:
        labels = grid.labels.get(result.method or "", {})
        accuracy = [f"{result.accuracy[task]:.6f}" for task in grid.study.tasks]
        lines.append(
            [result.kind, result.base or "", *(labels.get(axis, "") for axis in axes)]
            + ["" if v is None else v for v in (result.seed, result.extra_parameters)]
            + [*accuracy, f"{result.average:.6f}"]
        )
    return lines


def _renamed(run: Run, method: str, base: str | None) -> Run:
    def rename(result: Result) -> Result:
        return replace(result, method=method, base=base or result.base)

    return replace(run, results=[rename(r) if r.kind == "repair" else r for r in run.results])
