"""The report's files: tables, figures, and one page that needs nothing beside it."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from ..config import Json
from ..files import write_files
from . import formatting, tables
from .figures import Picture, pictures
from .formatting import readable
from .runs import Evaluation, gather, read_run
from .study import INDEX, Study, read_study
from .style import HUES, NARROW, Palette, to_files, to_inline_svg

_PACKAGES = (
    "fusion-bench-intervmerge",
    "fusion-bench",
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "lightning",
    "hydra-core",
    "numpy",
)


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
        bases: the merging methods to report; all where empty.
        title: the page's.
        console: where the table is printed too.

    Raises:
        ConfigError: runs or a folder that cannot be read, do not fit together, or not be written.
    """
    grids = [run for run in runs if (Path(run) / INDEX).is_file()]
    studies = list(map(read_study, grids))
    single = [read_run(run) for run in runs if run not in grids]
    evaluation = gather(single + [run for s in studies for run in s.evaluation.runs], bases)
    folder = Path(runs[0]) / "report" if to is None else Path(to)
    command = ["intervmerge", "report", *map(str, runs), *(["--to", str(to)] if to else [])]
    command += [word for base in bases for word in ("--base", base)]
    # everything is made before anything is written
    content: dict[str, str | bytes] = {}
    sections = []
    subjects: list[Study | Evaluation] = [*studies, evaluation]
    for subject in subjects:
        of = subject.evaluation if isinstance(subject, Study) else subject
        palette = Palette(of.methods)
        for picture in pictures(subject):
            both = {"wide": picture.draw(palette), "narrow": picture.draw(palette, NARROW)}
            if picture.file:
                content |= to_files(both["wide"], picture.file)
            words = f"{picture.title}. {picture.text}"
            svg = {k: to_inline_svg(f, f"{picture.name}-{k}", words) for k, f in both.items()}
            sections.append((picture, svg))
    content["report.html"] = _page(evaluation, sections, title, shlex.join(command))
    if evaluation.rows:
        content["table.md"] = tables.to_markdown(evaluation)
        content["table.csv"] = tables.to_csv(evaluation)
        content["table.json"] = json.dumps(tables.to_json(evaluation), indent=2) + "\n"
    write_files(folder, content)
    if console is not None and evaluation.rows:
        console.print(tables.to_terminal(evaluation, console))
    return folder


def _page(
    evaluation: Evaluation, sections: Sequence[tuple[Picture, Json]], title: str, command: str
) -> str:
    """The page, as HTML that loads nothing from elsewhere."""
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows, cells = evaluation.rows, tables.cells(evaluation)
    first = ["average", "gap closed", "extra parameters"]
    last = cells.columns.difference([*first, *evaluation.tasks], sort=False)
    cells = cells[[*first, *last, *evaluation.tasks]]
    if len(evaluation.bases) > 1:
        cells.insert(0, "merge", [tables.Cell(readable(row.base) or tables.NONE) for row in rows])
    versions = [("Python", platform.python_version())]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append((package, version(package)))
    return environment.get_template("page.html").render(
        title=title,
        of=evaluation,
        caption=tables.caption(evaluation) if rows else "",
        heads=[readable(head) if head in evaluation.tasks else head.capitalize() for head in cells],
        lines=list(zip(rows, cells.to_numpy().tolist(), strict=True)),
        sections=sections,
        command=command,
        versions=versions,
        today=datetime.date.today().isoformat(),
        hues=HUES,
        words=formatting,
    )
