"""A study: a grid of runs that differ along named axes, as one table and its figures.

The grid's sweeper (``hydra/sweeper=grid``) writes ``study.json`` into the sweep's folder: what is
studied, and the folder and the labels of every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import ConfigError, Json
from . import tables
from .formatting import NONE, family, percent, readable
from .runs import KEY, REPORT, Evaluation, Row, Run, gather, read_json, read_run

INDEX = "study.json"
_NOT_SETTINGS = ("seed", "also")  # axes that do not tell one setting from another


@dataclass(frozen=True)
class Study:
    """A grid of runs, finished or half-finished.

    Attributes:
        about: ``title``, ``source`` (of the paper), ``x``: the axis whose labels are numbers, or
            ``extra_parameters``; without it the settings stand side by side. ``xlabel``, ``log``
            and ``by_task`` (one panel per task) shape the figure, ``columns`` names an axis that
            stands across the table.
        evaluation: all models; ``method`` is a setting's name.
        labels: a setting's name -> axis -> label.
        finished, planned: number of runs.
    """

    about: Json
    evaluation: Evaluation
    labels: dict[str, dict[str, str]]
    finished: int
    planned: int

    @property
    def title(self) -> str:
        """What was studied, and how much of it is there."""
        source = f" ({self.about['source']})" if self.about.get("source") else ""
        half = f": {self.finished} of {self.planned} runs" * (self.finished < self.planned)
        return f"{self.about['title']}{source}{half}"

    def settings(self) -> list[tuple[dict[str, str], Row]]:
        """The settings over their seeds: labels (the base's too) and results."""
        rows = self.evaluation.repairs
        return [({**self.labels[row.method], "base": row.base}, row) for row in rows]

    def series(self) -> dict[str, dict[float, Row]]:
        """Curves along ``x`` by name: x -> results, in ascending order."""
        x, series = self.about["x"], dict[str, dict[float, Row]]()
        for labels, row in self.settings():
            if x == "extra_parameters":  # a curve joins settings that differ by their size alone
                name, at = family(row.method), float(row.extra_parameters or 0)
            else:
                rest = [label for axis, label in labels.items() if axis not in (x, "base")]
                rest += [readable(row.base)] * (len(self.evaluation.bases) > 1)
                name, at = ", ".join(rest), float(labels[x])
            series.setdefault(name, {})[at] = row
        return {name: dict(sorted(rows.items())) for name, rows in series.items()}


def read_index(folder: Path) -> tuple[Json, list[tuple[str, dict[str, str]]]]:
    """What a grid studies, and the folder and the labels of every run.

    Raises:
        ConfigError: this is no folder of a grid.
    """
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        jobs = [(str(job["folder"]), dict(job["labels"])) for job in index["jobs"]]
        return {"title": folder.name, "name": folder.name, **(index["study"] or {})}, jobs
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error!r})".replace("\n", " ")
        raise ConfigError(str(folder / INDEX), problem, "the folder of a grid of runs") from None


def finished(
    folder: Path, jobs: Sequence[tuple[str, dict[str, str]]]
) -> Iterator[tuple[dict[str, str], Run]]:
    """The labels of every finished run, and the run."""
    for name, labels in jobs:
        report = None
        with suppress(ConfigError):  # of a run that was killed while it wrote it
            report = read_json(folder / name / REPORT)
        if report is not None:
            yield labels, read_run(folder / name)


def apart(folder: Path) -> pd.DataFrame:
    """The averages of a grid whose runs are of different tasks, each by itself.

    Returns:
        One line per run and model: the run's labels, ``kind``, ``base``, ``method``, ``average``,
        its deviation ``std`` and the number of ``seeds``, shares of test images.
    """
    lines = [
        {
            **labels,
            **{key: getattr(row, key) for key in KEY},
            "average": row.mean["average"],
            "std": row.std["average"],
            "seeds": max(1, len(row.seeds)),
        }
        for labels, run in finished(folder, read_index(folder)[1])
        for row in gather([run]).rows
    ]
    return pd.DataFrame(lines)


def across(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines of ``apart`` for people: models down, runs across."""
    labels = [name for name in lines if name not in (*KEY, "average", "std", "seeds")]
    shown = lines.assign(
        model=[readable(line.method or line.base or line.kind) for line in lines.itertuples()],
        run=lines[labels].agg(", ".join, axis=1),
        cell=[percent(line.average, line.std) for line in lines.itertuples()],
    )
    table = shown.pivot(index="model", columns="run", values="cell")
    table = table.reindex(index=shown["model"].unique(), columns=shown["run"].unique())
    return table.rename_axis(columns=None).reset_index()


def read_study(folder: str | Path) -> Study:
    """Read what is finished of a grid.

    Raises:
        ConfigError: no run is finished, or the runs do not fit together.
    """
    folder = Path(folder)
    about, jobs = read_index(folder)
    runs, labels = [], {}
    for job, run in finished(folder, jobs):
        if "also" not in job:
            setting = {a: v for a, v in job.items() if a.rpartition(".")[2] not in _NOT_SETTINGS}
            base = setting.pop("base", None)
            method = setting_name(setting) or "repair"
            labels[method] = setting
            update = {"method": method, **({"base": base} if base else {})}
            models = {
                name: model.model_copy(update=update) if model.kind == "repair" else model
                for name, model in run.models.items()
            }
            run = replace(run, models=models)
        runs.append(run)
    if not runs:
        raise ConfigError(str(folder), "no run of the grid is finished", f"{len(jobs)} runs")
    along = pd.Series(
        [label.get(str(about.get("x")), "0") for label in labels.values()], dtype=object
    )
    if not np.isfinite(pd.to_numeric(along, errors="coerce")).all():
        del about["x"]  # the command line may replace an axis' numbers by any values
    return Study(about, gather(runs), labels, len(runs), len(jobs))


def setting_name(labels: Mapping[str, str]) -> str:
    """A setting for people: labels that say nothing alone, as numbers, follow their axis' name."""
    return ", ".join(
        label if label[:1].isalpha() else f"{axis.rpartition('.')[2]} {label}"
        for axis, label in labels.items()
    )


def table(study: Study) -> pd.DataFrame:
    """The study for people: settings down, and across the tasks, or the labels of an axis."""
    axis, of = study.about.get("columns"), study.evaluation
    if not axis:
        whole = tables.cells(of).map(str)[[*of.tasks, "average", "extra parameters"]]
        whole.insert(0, "setting", [row.method or row.label for row in of.rows])
        if len(of.bases) > 1:
            whole.insert(0, "merge", [readable(row.base) for row in of.rows])
        return whole
    across = list(dict.fromkeys(labels[axis] for labels, _ in study.settings()))
    cells: dict[str, dict[str, str]] = {}
    if axis == "base":
        merges = [row for row in of.rows if row.kind == "merge"]
        cells["merge alone"] = {row.base: percent(row.mean["average"]) for row in merges}
    for labels, row in study.settings():
        name = setting_name({a: v for a, v in labels.items() if a not in (axis, "base")})
        shown = percent(row.mean["average"], row.std["average"])
        cells.setdefault(name, {})[labels[axis]] = shown
    whole = pd.DataFrame.from_dict(cells, orient="index").reindex(columns=across)
    return whole.fillna(NONE).rename(columns=readable).rename_axis("setting").reset_index()


def to_markdown(study: Study) -> str:
    """The table with its heading and what its numbers are."""
    repairs = study.evaluation.repairs
    images = sorted({row.images for row in repairs if row.images})
    text = tables.caption(study.evaluation, gap=False)
    text += f" Edits were found on {'; or '.join(images)}." if len(images) < 4 else ""
    if any(row.transductive for row in repairs):
        text += " Transductive: these are images of the test split."
    return f"# {study.title}\n\n{tables.markdown(table(study))}\n\n{text}\n"


def to_csv(study: Study) -> str:
    """Every run's own numbers: one line per model and seed."""
    models = study.evaluation.models.astype({"seed": "Int64", "extra_parameters": "Int64"})
    labels = models["method"].map(lambda method: study.labels.get(method, {})).apply(pd.Series)
    numbers = models[["seed", "extra_parameters", *study.evaluation.tasks, "average"]]
    shown = pd.concat([models[["kind", "base"]], labels, numbers], axis=1)
    return shown.to_csv(index=False, float_format="%.6f", lineterminator="\n")
