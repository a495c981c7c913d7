"""The result table: methods down, tasks across; for people, spreadsheets and programs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import isnan, nan
from textwrap import shorten
from typing import NamedTuple

import pandas as pd
from rich.console import Console
from rich.table import Table

from ..config import Json
from .formatting import NONE, count, duration, percent, readable
from .runs import REPAIRS, Evaluation, Row


class Column(NamedTuple):
    """A column behind the accuracies: a number of ``Row.mean`` or ``Row.costs``, and its words.

    One that does not stand there ``always`` does beside rivals, where a row has a value.
    """

    title: str
    name: str
    words: Callable[[float], str]
    always: bool = False


COLUMNS = (
    Column("extra parameters", "extra_parameters", count, True),
    Column("gap closed", "gap_closed", lambda v: f"{100 * v:.0f}%", True),
    Column("seconds", "seconds", duration, True),
    Column("of the experts", "of_experts", percent),
    Column("bytes", "bytes", count),
    Column("labels a task", "labels", lambda v: f"{v:.0f}"),
    Column("passes an image", "passes", lambda v: f"{v:g}"),
    Column("needs the task", "needs_task", lambda v: "yes" if v else "no"),
)


class Cell(NamedTuple):
    """A number for people: how it is written, its deviation, and what to sort it by."""

    text: str
    spread: str = ""
    value: float = nan
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


def cells(evaluation: Evaluation) -> pd.DataFrame:
    """The table: a line a row, a column a task, the average, and ``COLUMNS`` as far as known."""
    rows, names = evaluation.rows, [*evaluation.tasks, "average"]
    best = {}
    for base in evaluation.bases:
        repairs = [row for row in evaluation.repairs if row.base == base]
        for name in names if len(repairs) > 1 else []:
            best[base, name] = max(repairs, key=lambda row: row.mean[name])

    def cell(row: Row, name: str) -> Cell:
        spread = "" if isnan(row.std[name]) else f"± {percent(row.std[name])}"
        winner = best.get((row.base, name)) is row
        return Cell(percent(row.mean[name]), spread, row.mean[name], winner)

    found = pd.DataFrame([[cell(row, name) for name in names] for row in rows], columns=names)
    rivals = any(row.kind == "rival" for row in rows)
    for column in COLUMNS:
        values = [{**row.mean, **row.costs}.get(column.name, nan) for row in rows]
        if column.always or (rivals and not all(map(isnan, values))):
            texts = [NONE if isnan(v) else column.words(v) for v in values]
            found[column.title] = [Cell(t, "", v) for t, v in zip(texts, values, strict=True)]
    return found


def label(row: Row) -> str:
    """A row's name where it stands below its merge."""
    return f"+ {row.label}" if row.kind in REPAIRS else row.label


def to_json(evaluation: Evaluation) -> Json:
    """The table as plain values: shares in [0, 1], nothing rounded, every seed's own number."""

    def number(row: Row, name: str) -> Json | None:
        values, std = row.values[name].dropna().tolist(), float(row.std[name])
        about = {"std": None if isnan(std) else std, "by_seed": values}
        return {"mean": float(row.mean[name]), **about} if values else None

    return {
        "tasks": evaluation.tasks,
        "runs": [run.name for run in evaluation.runs],
        "rows": [
            {
                "kind": row.kind,
                "base": row.base or None,
                "method": row.method or None,
                "seeds": row.seeds,
                "accuracy": {task: number(row, task) for task in evaluation.tasks},
                **{name: number(row, name) for name in ("average", "gap_closed", "of_experts")},
                "extra_parameters": None,
                "seconds": number(row, "seconds"),
                **row.costs,
                "images_used": row.images or None,
                "transductive": row.transductive,
            }
            for row in evaluation.rows
        ],
    }


def to_csv(evaluation: Evaluation) -> str:
    """The table for a spreadsheet: percent with two decimals, deviations in columns apart."""
    names, lines = [*evaluation.tasks, "average"], []
    for row in evaluation.rows:
        line = {"base": row.base, "method": row.method, "kind": row.kind, "seeds": len(row.seeds)}
        for name in names:
            line |= {name: 100 * row.mean[name], f"{name}_std": 100 * row.std[name]}
        line["extra_parameters"] = row.extra_parameters
        line |= {"gap_closed": 100 * row.mean["gap_closed"], "seconds": row.mean["seconds"]}
        lines.append(line)
    found = pd.DataFrame(lines).astype({"extra_parameters": "Int64"})
    return found.to_csv(index=False, float_format="%.2f", lineterminator="\n")


def to_markdown(evaluation: Evaluation) -> str:
    """The table for a README; the best repair of each base and column is bold."""
    table = cells(evaluation).map(lambda cell: f"**{cell}**" if cell.best else str(cell))
    table.insert(0, "method", list(map(label, evaluation.rows)))
    return f"{markdown(table)}\n\n{caption(evaluation)}\n"


def markdown(table: pd.DataFrame) -> str:
    """Lines of text, the first column to the left, the others to the right."""
    rule = [" --- ", *[" ---: "] * (len(table.columns) - 1)]
    body = [[f" {cell} " for cell in line] for line in [table.columns, *table.to_numpy()]]
    return "\n".join(f"|{'|'.join(line)}|" for line in [body[0], rule, *body[1:]])


def to_terminal(evaluation: Evaluation, console: Console) -> Table:
    """As much as fits into the terminal: the tasks' deviations give way first, then the tasks."""
    whole, rows, tasks = cells(evaluation), evaluation.rows, evaluation.tasks
    plain = whole.assign(**{task: whole[task].map(lambda cell: cell.text) for task in tasks})
    ends = [i for i, row in enumerate(rows[1:]) if row.base != rows[i].base]
    names = pd.Series(list(map(label, rows)), name="method")
    unbounded = console.options.update(max_width=10**4)
    for table in (whole, plain, whole.drop(columns=tasks)):
        shown = rich(pd.concat([names, table.map(str)], axis=1), ends)
        if console.measure(shown, options=unbounded).maximum <= console.width:
            break
    if tasks and tasks[0] not in table:
        shown.caption = "The terminal is too narrow for the tasks; the written table has them."
    shown.title = "Accuracy in percent"
    return shown


def rich(table: pd.DataFrame, ends: Collection[int] = ()) -> Table:
    """Lines of text for a terminal, with a rule behind some of them."""
    shown, titles = Table(title_justify="left", caption_justify="left"), [c.title for c in COLUMNS]
    for i, head in enumerate(table):
        words = head.replace(" ", "\n", 1) if head in titles else head
        shown.add_column(words, justify="right" if i else "left", no_wrap=True)
    for i, line in enumerate(table.to_numpy().tolist()):
        shown.add_row(*line, end_section=i in ends)
    return shown


def caption(evaluation: Evaluation, gap: bool = True) -> str:
    """What the numbers are, in one or two sentences."""
    seeds = {len(row.seeds) for row in evaluation.rows}
    few = "" if len(seeds - {0}) < 2 else "up to "
    text = "Accuracy in percent"
    text += f", mean ± standard deviation over {few}{max(seeds)} seeds" if max(seeds) > 1 else ""
    text += ". Extra parameters: beyond one merged model, over all tasks."
    if gap and any(row.mean["gap_closed"] == row.mean["gap_closed"] for row in evaluation.rows):
        text += " Gap closed: the share of the way from the merge to the experts."
    for run in evaluation.runs:
        for name, reason in run.problems.items():
            text += f" {readable(name)} did not run ({shorten(reason, 120, placeholder=' ...')})."
    return text
