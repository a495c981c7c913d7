"""The report's files: tables, figures, and one page that needs nothing beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console

from ..files import write_files
from . import figures, tables
from .analysis_figures import Drawing, drawings
from .drawing import NARROW, WIDE, css_variables, to_inline_svg, to_png, to_svg
from .runs import Study, gather, read_run
from .study import Grid, is_study, read_study
from .study import drawings as drawings_of
from .study import title as title_of
from .tables import Row
from .words import NONE, count, duration, listed, percent, readable

_FEW = 6  # runs whose distances to the experts are all shown
Draw = Callable[[float], Figure | None]
_PACKAGES = (
    "fusion-bench-intervmerge", "fusion-bench", "torch", "torchvision", "transformers",
    "open_clip_torch", "lightning", "hydra-core", "numpy",
)  # fmt: skip


def write_report(
    runs: Sequence[str | Path],
    to: str | Path | None = None,
    bases: Sequence[str] = (),
    title: str = "IntervMerge report",
    console: Console | None = None,
) -> Path:
    """Write tables, figures and the page of these runs.

    Args:
        runs: folders of runs, and of studies, which are grids of runs.
        to: the report's folder; ``report`` in the first run's folder where None. Other files in it
            stay as they are.
        bases: the merging methods to report; all where empty.
        title: the page's.
        console: where the table is printed; nowhere where None.

    Returns:
        The report's folder.

    Raises:
        ConfigError: runs that cannot be read or do not belong together, or a folder that cannot be
            written to.
    """
    grids = {str(run): read_study(run) for run in runs if is_study(run)}
    found = [grids[str(run)].study.runs if str(run) in grids else [read_run(run)] for run in runs]
    study = gather(list(itertools.chain.from_iterable(found)), bases)
    table = tables.rows(study)
    folder = Path(runs[0]) / "report" if to is None else Path(to)
    command = ["intervmerge", "report", *map(str, runs), *(["--to", str(to)] if to else [])]
    command += [word for base in bases for word in ("--base", base)]
    # everything is made before anything is written
    sections = [*_of_grids(list(grids.values())), *_sections(study, table)]
    content: dict[str, str | bytes] = {}
    for section in sections:
        if section.file is not None:
            content[f"{section.file}.png"] = to_png(section.wide)
            content[f"{section.file}.svg"] = to_svg(section.wide)
    content["report.html"] = _render(study, table, sections, title, shlex.join(command))
    if table:
        content["table.md"] = tables.to_markdown(study, table)
        content["table.csv"] = tables.to_csv(study, table)
        content["table.json"] = json.dumps(tables.to_json(study, table), indent=2) + "\n"
    write_files(folder, content)
    if console is not None and table:
        console.print(tables.to_terminal(study, table, console.width))
    return folder


def _render(
    study: Study, table: Sequence[Row], sections: Sequence[Section], title: str, command: str
) -> str:
    """The page, as HTML that loads nothing from elsewhere."""
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        subtitle=_subtitle(study, table),
        headline=_headline(table),
        caption=tables.caption(table) if table else "",
        columns=_columns(study),
        lines=_lines(study, table),
        sections=sections,
        seen=_seen(table),
        runs=study.runs,
        command=command,
        versions=_versions(),
        today=datetime.date.today().isoformat(),
        light=css_variables(dark=False),
        dark=css_variables(dark=True),
    )


@dataclass
class Section:
    """A figure of the page with its heading.

    Attributes:
        name: its anchor, unique.
        title: its heading.
        text: what it shows.
        words: the figure in words.
        wide, narrow: the figure for a screen and for a phone.
        file: under which name it lies beside the page; None: nowhere.
    """

    name: str
    title: str
    text: str
    words: str
    wide: Figure
    narrow: Figure
    file: str | None

    @cached_property
    def pictures(self) -> tuple[str, str]:
        """Inline SVG, (wide, narrow)."""
        both = (("wide", self.wide), ("narrow", self.narrow))
        wide, narrow = (to_inline_svg(f, f"{self.name}-{size}", self.words) for size, f in both)
        return wide, narrow


def _of_grids(grids: Sequence[Grid]) -> list[Section]:
    found = []
    for grid in grids:
        name = re.sub(r"[^\w-]", "_", str(grid.about.get("name", "study")))
        text = (
            "Mean over seeds; whiskers are the standard deviation, lines the merge and the experts."
        )
        for number, make in enumerate(drawings_of(grid)):
            section = _section(f"{name}-{number}", title_of(grid), text, make)
            found += [section] if section else []
    return found


def _sections(study: Study, table: Sequence[Row]) -> list[Section]:
    several = len({row.method for row in table if row.method}) > 1
    found = [
        _section(
            "parameters",
            "Accuracy against extra parameters",
            "Average accuracy over tasks. Lines are the merge without repair and the experts; "
            "whiskers are the standard deviation over seeds.",
            partial(figures.accuracy_vs_parameters, study, table),
            _in_words(table),
            file="accuracy_vs_parameters",
        ),
        _section(
            "tasks",
            "Task by task",
            "A bar reaches from a task's lowest accuracy to its highest; the numbers are in the "
            "table above.",
            partial(figures.accuracy_by_task, study, table),
            file="accuracy_by_task",
        ),
        _section(
            "training",
            "Training",
            "The distillation loss at each step, a running mean over a fortieth of the steps"
            + ("; methods with different losses cannot be compared by it." if several else "."),
            partial(figures.training_curves, study, table),
        ),
    ]
    for number, run in enumerate(study.runs if len(study.runs) <= _FEW else []):
        of = f" ({run.folder.resolve().name})" if len(study.runs) > 1 else ""
        features = run.features
        agreement = any("agreement_after" in row for row in features.values())
        found.append(
            _section(
                f"features-{number}",
                f"Distance to the experts{of}",
                "On training images: the mean absolute difference of image features to the "
                "expert's, before the repair and after it"
                + (", and how often the predicted class is the expert's." if agreement else "."),
                partial(figures.features, features),
            )
        )
    for suffix, of, drawing in analysed(study):
        name, title = drawing.name + suffix, drawing.title + of
        found.append(_section(name, title, drawing.text, drawing.draw, file=name))
    return [section for section in found if section is not None]


def analysed(study: Study) -> Iterator[tuple[str, str, Drawing]]:
    """The figures of every analysed merge: a suffix for names, words for titles, the figure."""
    merges = [
        (number, run, merge)
        for number, run in enumerate(study.runs)
        for merge in run.analysis
        if merge in study.bases or not run.results
    ]
    for number, run, merge in merges:
        suffix, words = "", []
        if len({name for _, _, name in merges}) > 1:
            suffix += f"-{merge}"
            words.append(readable(merge))
        if len(study.runs) > 1:
            suffix += f"-{number}"
            words.append(run.folder.resolve().name)
        of = f" ({', '.join(words)})" if words else ""
        for drawing in drawings(run.analysis[merge]):
            yield re.sub(r"[^\w-]", "_", suffix), of, drawing


def _section(
    name: str, title: str, text: str, draw: Draw, words: str = "", file: str | None = None
) -> Section | None:
    """None where there is nothing to draw."""
    wide, narrow = draw(WIDE), draw(NARROW)
    if wide is None or narrow is None:
        return None
    return Section(name, title, text, words or f"{title}. {text}", wide, narrow, file)


def _columns(study: Study) -> list[dict[str, str]]:
    columns = [{"title": "Method", "kind": "text"}]
    if len(study.bases) > 1:
        columns.append({"title": "Merge", "kind": "text"})
    titles = ["Average", "Gap closed", "Extra parameters", "Seconds", *map(readable, study.tasks)]
    return columns + [{"title": title, "kind": "number"} for title in titles]


def _lines(study: Study, table: Sequence[Row]) -> list[dict[str, Any]]:
    """The table's rows: cells of (text, deviation, value to sort by, whether it is the best)."""
    best, lines = tables.best_repairs(table), []
    for i, row in enumerate(table):
        cells: list[tuple[str, str, Any, bool]] = []
        if len(study.bases) > 1:
            base = readable(row.base) if row.base else NONE
            cells.append((base, "", base, False))
        gap = row.gap_closed.mean if row.gap_closed else None
        took = row.seconds.mean if row.seconds else None
        extra = row.extra_parameters
        average, *tasks = (
            (
                percent(stat.mean),
                "" if stat.std is None else f"± {percent(stat.std)}",
                stat.mean,
                (row.base, name, row.method) in best,
            )
            for name, stat in [("average", row.average), *row.accuracy.items()]
        )
        cells += [
            average,
            (NONE if gap is None else f"{percent(gap, digits=0)}%", "", gap, False),
            (NONE if extra is None else count(extra), "", extra, False),
            (duration(took), "", took, False),
            *tasks,
        ]
        lines.append(
            {
                "label": row.label.removeprefix("+ "),
                "name": "/".join(filter(None, (row.base, row.method))) or row.kind,
                "kind": row.kind,
                "first": i > 0 and row.base != table[i - 1].base,
                "cells": cells,
            }
        )
    return lines


def _subtitle(study: Study, table: Sequence[Row]) -> str:
    if not table:
        return f"{len(study.tasks)} tasks, not evaluated by a task pool"
    methods = len({row.method for row in table if row.method})
    seeds = max((len(row.seeds) for row in table), default=0)
    merges = [readable(base) for base in study.bases]
    text = f"{listed(merges)}, {len(study.tasks)} tasks"
    text += f", {methods} repair{'s' * (methods != 1)}" if methods else ""
    return text + (f", {seeds} seeds each" if seeds > 1 else "")


def _headline(table: Sequence[Row]) -> str | None:
    """The best repair in a sentence; None where there is no merge to compare with."""
    merges = {row.base: row for row in table if row.kind == "merge"}
    repairs = [row for row in table if row.kind == "repair" and row.base in merges]
    if not repairs:
        return None
    best = max(repairs, key=lambda row: row.average.mean)
    merge = merges[best.base]
    if best.average.mean <= merge.average.mean:
        return "No repair improves on the merge."
    text = (
        f"{readable(best.method or '')} takes {readable(best.base or '')} from "
        f"{percent(merge.average.mean)}% to {percent(best.average.mean)}% average accuracy"
    )
    if best.extra_parameters:
        text += f" with {count(best.extra_parameters)} extra parameters"
    if best.gap_closed is not None:
        text += f", {percent(best.gap_closed.mean, digits=0)}% of the way to the experts"
    return text + "."


def _in_words(table: Sequence[Row]) -> str:
    parts = []
    for row in table:
        extra = f" with {count(row.extra_parameters)} parameters" if row.extra_parameters else ""
        of = f" on {readable(row.base or '')}" if row.method else ""
        label = row.label.removeprefix("+ ")
        parts.append(f"{label}{of} {percent(row.average.mean, row.average.std)}%{extra}")
    return "Average accuracy and extra parameters: " + "; ".join(parts) + "."


def _seen(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Which images each method saw; methods that saw the same stand together."""
    groups: dict[tuple[str, bool | None], dict[str, set[int]]] = {}
    for row in table:
        if row.images_used is not None:
            methods = groups.setdefault((row.images_used, row.transductive), {})
            methods.setdefault(readable(row.method or ""), set()).update(row.seeds)
    found = []
    for (images, transductive), methods in groups.items():
        seeds = sorted(set().union(*methods.values()))
        found.append(
            {
                "methods": listed(list(methods)),
                "images": images,
                "transductive": transductive,
                "seeds": ("seed " if len(seeds) == 1 else "seeds ") + listed(list(map(str, seeds))),
            }
        )
    return found


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
