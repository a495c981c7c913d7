"""The files of a report and of a study: tables, figures, and one page that loads nothing."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.console import Console

from ..files import write_files
from . import formatting, study, tables
from .differences import pairs
from .figures import draw_evaluation, draw_study
from .gallery import gallery
from .runs import Evaluation, gather, read_run
from .style import Picture, to_png, to_svg

_PACKAGES = "fusion-bench-intervmerge fusion-bench torch torchvision transformers open_clip_torch"


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
        to: the report's folder, which is returned; by default ``report`` in the first run's. Other
            files in it stay as they are.
        bases: the merging methods to report; all if empty.
        title: the page's.
        console: prints the table too.

    Raises:
        ConfigError: runs or a folder that cannot be read or written, or do not fit together.
    """
    grids = [run for run in runs if (Path(run) / study.INDEX).is_file()]
    studies = list(map(study.read_study, grids))
    single = [read_run(run) for run in runs if run not in grids]
    evaluation = gather(single + [run for s in studies for run in s.evaluation.runs], bases)
    folder = Path(runs[0]) / "report" if to is None else Path(to)
    command = ["intervmerge", "report", *map(str, runs), *(["--to", str(to)] if to else [])]
    command += [word for base in bases for word in ("--base", base)]
    # everything is made before anything is written
    content: dict[str, str | bytes] = {}
    sections = []
    for picture in [p for grid in studies for p in draw_study(grid)] + draw_evaluation(evaluation):
        svg = to_svg(picture.figure)
        content |= {f"{picture.name}.png": to_png(picture.figure), f"{picture.name}.svg": svg}
        sections.append((picture, inline(svg, picture.name)))
    if evaluation.rows:
        content["table.md"] = tables.to_markdown(evaluation)
        content["table.csv"] = tables.to_csv(evaluation)
    if len(differences := pairs(evaluation)):
        content["differences.csv"] = differences.to_csv(
            index=False, float_format="%.2f", lineterminator="\n"
        )
    galleries = gallery(evaluation)
    shown = shlex.join(command), bool(galleries)
    content["report.html"] = _page(evaluation, sections, title, *shown)
    if galleries:
        content["gallery.html"] = _template("gallery.html").render(
            title=title, galleries=galleries, words=formatting
        )
    write_files(folder, content)
    if console is not None and evaluation.rows:
        console.print(tables.to_terminal(evaluation, console))
    return folder


def write_study(folder: str | Path, console: Console | None = None) -> None:
    """Write ``study.md``, ``study.csv``, ``study.png`` and ``study.svg`` beside the runs.

    Raises:
        ConfigError: as ``read_study``; or the folder cannot be written to.
    """
    about, _ = study.read_index(Path(folder))
    if about.get("apart"):  # runs of different tasks, which have no table together
        lines = study.apart(Path(folder))
        table = study.across(lines)
        csv = lines.to_csv(index=False, float_format="%.6f", lineterminator="\n")
        text = f"# {about['title']}\n\n{tables.markdown(table)}\n"
        write_files(Path(folder), {"study.md": text, "study.csv": csv})
        (console or Console()).print(tables.rich(table))
        return
    grid = study.read_study(folder)
    content: dict[str, str | bytes] = {
        "study.md": study.to_markdown(grid),
        "study.csv": study.to_csv(grid),
    }
    for number, picture in enumerate(draw_study(grid)):
        name = "study" if number == 0 else f"study_{number + 1}"
        content |= {f"{name}.png": to_png(picture.figure), f"{name}.svg": to_svg(picture.figure)}
    write_files(Path(folder), content)
    console = console or Console()
    console.print(grid.title, style="bold")
    across = tables.rich(study.table(grid)) if grid.about.get("columns") else None
    console.print(across or tables.to_terminal(grid.evaluation, console))
    console.print(f"Table and figure: {Path(folder) / 'study.md'}, study.png", soft_wrap=True)


def inline(svg: bytes, name: str) -> str:
    """The ``<svg>`` element, whose ids begin with ``name``, which is unique in the page."""
    text = svg.decode()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text[text.index("<svg") :])


def _template(name: str) -> Template:
    return Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def _page(
    evaluation: Evaluation,
    sections: Sequence[tuple[Picture, str]],
    title: str,
    command: str,
    gallery: bool,
) -> str:
    """The page, as HTML that loads nothing from elsewhere."""
    rows, cells = evaluation.rows, tables.cells(evaluation)
    first = ["average", *cells.columns.intersection([tables.BELOW])]
    first += ["gap closed", "extra parameters"]
    last = cells.columns.difference([*first, *evaluation.tasks], sort=False)
    cells = cells[[*first, *last, *evaluation.tasks]]
    versions = [("Python", platform.python_version())]
    for package in _PACKAGES.split():
        with suppress(PackageNotFoundError):
            versions.append((package, version(package)))
    return _template("page.html").render(
        title=title,
        of=evaluation,
        caption=tables.caption(evaluation) if rows else "",
        heads=[formatting.readable(h) if h in evaluation.tasks else h.capitalize() for h in cells],
        lines=list(zip(rows, cells.to_numpy().tolist(), strict=True)),
        sections=sections,
        command=command,
        gallery=gallery,
        versions=versions,
        today=datetime.date.today().isoformat(),
        words=formatting,
    )
