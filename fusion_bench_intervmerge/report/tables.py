"""The result table: methods down, tasks across; for people and for spreadsheets."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import isnan, nan
from textwrap import shorten
from typing import NamedTuple

import pandas as pd
from rich.console import Console
from rich.table import Table

from .differences import to_best
from .formatting import NONE, count, duration, percent, readable
from .runs import COSTS, REPAIRS, Evaluation, Row


class Column(NamedTuple):
    """A column behind the accuracies: its title, a number of ``Row.mean`` or ``Row.costs``.

    A column that is not ``always`` there needs a rival, and a row with a value.
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
    Column("labels per task", "labels", lambda v: f"{v:.0f}"),
    Column("passes per image", "passes", lambda v: f"{v:g}"),
    Column("needs the task", "needs_task", lambda v: "yes" if v else "no"),
)


BELOW = "below the best"


class Cell(NamedTuple):
    """A number for people: how it is written, its deviation, and what to sort it by."""

    text: str
    spread: str = ""
    value: float = nan
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


def cells(evaluation: Evaluation) -> pd.DataFrame:
    """The table: one line per row, one column per task, the average, and ``COLUMNS``.

    If the answers are known, ``BELOW`` says how far the average is below the best repair's.
    """
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

    table = pd.DataFrame([[cell(row, name) for name in names] for row in rows], columns=names)
    below = to_best(evaluation)
    if below:
        known = [below.get(place) for place in range(len(rows))]
        table[BELOW] = [
            Cell(percent(d.mean), f"± {percent(d.half)}", d.mean) if d else Cell(NONE)
            for d in known
        ]
    rivals = any(row.kind == "rival" for row in rows)
    for column in COLUMNS:
        values = [{**row.mean, **row.costs}.get(column.name, nan) for row in rows]
        if column.always or (rivals and not all(map(isnan, values))):
            texts = [NONE if isnan(v) else column.words(v) for v in values]
            table[column.title] = [Cell(t, "", v) for t, v in zip(texts, values, strict=True)]
    return table


def label(row: Row) -> str:
    """A row's name below its merge."""
    return f"+ {row.label}" if row.kind in REPAIRS else row.label


def to_csv(evaluation: Evaluation) -> str:
    """The table for a spreadsheet: shares in percent, deviations in columns of their own."""
    shares = [*evaluation.tasks, "average", "gap_closed", "of_experts"]
    lines = []
    for row in evaluation.rows:
        line = {"base": row.base, "method": row.method, "kind": row.kind, "seeds": len(row.seeds)}
        for name in shares:
            line |= {name: 100 * row.mean[name], f"{name}_std": 100 * row.std[name]}
        about = {"seconds": row.mean["seconds"], "transductive": row.transductive}
        lines.append(line | {cost: row.costs.get(cost) for cost in COSTS} | about)
    table = pd.DataFrame(lines).astype({"extra_parameters": "Int64", "bytes": "Int64"})
    return table.to_csv(index=False, float_format="%.2f", lineterminator="\n")


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
    """The table, without the tasks, and the seconds, if the terminal is too narrow for them."""
    table, rows, tasks = cells(evaluation), evaluation.rows, evaluation.tasks
    # of the tasks, the deviations are in the written table
    table[tasks] = table[tasks].map(lambda cell: cell.text)
    table = table.map(str)
    table.insert(0, "method", list(map(label, rows)))
    ends = [i for i, row in enumerate(rows[1:]) if row.base != rows[i].base]
    shown, unbounded = rich(table, ends), console.options.update(max_width=10**4)
    for less in (tasks, ["seconds"]):
        if console.measure(shown, options=unbounded).maximum > console.width:
            table = table.drop(columns=less)
            shown = rich(table, ends)
            shown.caption = "The terminal is too narrow for the tasks; the written table has them."
    shown.title = "Accuracy in percent"
    return shown


def rich(table: pd.DataFrame, ends: Collection[int] = ()) -> Table:
    """Lines of text for a terminal, with a rule behind some of them."""
    shown = Table(title_justify="left", caption_justify="left")
    titles = [BELOW, *(column.title for column in COLUMNS)]
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
    if to_best(evaluation):
        text += " Below the best: than the best repair on the same images, with 95 % intervals."
    if gap and any(not isnan(row.mean["gap_closed"]) for row in evaluation.rows):
        text += " Gap closed: the share of the way from the merge to the experts."
    for run in evaluation.runs:
        for name, reason in run.problems.items():
            text += f" {readable(name)} did not run ({shorten(reason, 120, placeholder=' ...')})."
    return text
