"""The result table: methods down, tasks across; for people, spreadsheets and programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .runs import Result, Study
from .words import NONE, count, duration, percent, readable


@dataclass(frozen=True)
class Stat:
    """A quantity over seeds.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1); None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Unrounded, for JSON."""
        return {"mean": self.mean, "std": self.std, "by_seed": list(self.values)}


@dataclass(frozen=True)
class Row:
    """One line of the table: a reference, a merge, or a repair over its seeds.

    Attributes:
        kind, base, method: as in ``Result``.
        seeds: empty for what has none.
        accuracy: task -> share in [0, 1].
        average: mean over tasks, share in [0, 1].
        gap_closed: (average - merge) / (experts - merge), 1 where the experts are reached; None
            where the run lacks either, or the merge is no worse than the experts.
        extra_parameters: over all tasks.
        seconds: of merging or repairing.
        images_used, transductive: as in ``Result``.
    """

    kind: str
    base: str | None
    method: str | None
    seeds: tuple[int, ...]
    accuracy: dict[str, Stat]
    average: Stat
    gap_closed: Stat | None = None
    extra_parameters: int | None = None
    seconds: Stat | None = None
    images_used: str | None = None
    transductive: bool | None = None

    @property
    def label(self) -> str:
        """The row's name for people."""
        if self.kind == "repair":
            return f"+ {readable(self.method or '')}"
        return readable(self.base or self.kind)


def rows(study: Study) -> list[Row]:
    """One row a model: pretrained, then each merge with its repairs, then the experts."""
    groups: dict[tuple[str, str | None, str | None], list[Result]] = {}
    for result in study.results:
        groups.setdefault((result.kind, result.base, result.method), []).append(result)
    experts = _average(groups, ("experts", None, None))
    found: list[Row] = []
    order = [
        ("pretrained", None),
        *((kind, b) for b in study.bases for kind in ("merge", "repair")),
    ]
    for wanted in [*order, ("experts", None)]:
        for key, results in groups.items():
            if key[:2] == wanted:
                merge = _average(groups, ("merge", key[1], None))
                found.append(_row(key, results, study.tasks, merge, experts))
    return found


def to_json(study: Study, table: Sequence[Row]) -> dict[str, Any]:
    """The table as plain values: shares in [0, 1], nothing rounded, every seed's own number."""
    return {
        "tasks": study.tasks,
        "runs": [run.folder.resolve().name for run in study.runs],
        "rows": [
            {
                "kind": row.kind,
                "base": row.base,
                "method": row.method,
                "seeds": list(row.seeds),
                "accuracy": {task: stat.to_dict() for task, stat in row.accuracy.items()},
                "average": row.average.to_dict(),
                "gap_closed": row.gap_closed.to_dict() if row.gap_closed else None,
                "extra_parameters": row.extra_parameters,
                "seconds": row.seconds.to_dict() if row.seconds else None,
                "images_used": row.images_used,
                "transductive": row.transductive,
            }
            for row in table
        ],
    }


def to_csv(study: Study, table: Sequence[Row]) -> str:
    """The table for a spreadsheet: percent with two decimals, deviations in columns apart."""
    names = [*study.tasks, "average"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head = ["base", "method", "kind", "seeds"]
    head += [column for name in names for column in (name, f"{name}_std")]
    writer.writerow([*head, "extra_parameters", "gap_closed", "seconds"])
    for row in table:
        cells = [row.base or "", row.method or "", row.kind, len(row.seeds)]
        for stat in [*row.accuracy.values(), row.average]:
            cells += [f"{100 * stat.mean:.2f}", "" if stat.std is None else f"{100 * stat.std:.2f}"]
        extra = "" if row.extra_parameters is None else row.extra_parameters
        gap = "" if row.gap_closed is None else f"{100 * row.gap_closed.mean:.2f}"
        seconds = "" if row.seconds is None else f"{row.seconds.mean:.1f}"
        writer.writerow([*cells, extra, gap, seconds])
    return stream.getvalue()


def to_markdown(study: Study, table: Sequence[Row]) -> str:
    """The table for a README; the best repair of each base and column is bold."""
    head = ["method", *study.tasks, "average", "extra parameters", "gap closed", "seconds"]
    best = best_repairs(table)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    for row in table:
        cells = [row.label]
        for name, stat in [*row.accuracy.items(), ("average", row.average)]:
            text = percent(stat.mean, stat.std)
            cells.append(f"**{text}**" if (row.base, name, row.method) in best else text)
        lines.append("| " + " | ".join([*cells, *_tail(row)]) + " |")
    return "\n".join([*lines, "", caption(table), ""])


def to_terminal(study: Study, table: Sequence[Row], width: int) -> Table:
    """The table for a terminal of ``width`` characters, with as much as fits into it.

    What gives way first are the tasks' deviations over seeds, then the tasks.
    """
    for tasks, deviations in ((study.tasks, True), (study.tasks, False), ([], True)):
        heads = [*tasks, "average", "extra\nparameters", "gap\nclosed", "seconds"]
        cells = [
            [percent(row.accuracy[t].mean, row.accuracy[t].std if deviations else None)
             for t in tasks]
            + [percent(row.average.mean, row.average.std), *_tail(row)]
            for row in table
        ]  # fmt: skip
        columns = zip(*cells, [head.split("\n")[-1] for head in heads], strict=True)
        widths = [max(len(row.label) for row in table), *(max(map(len, c)) for c in columns)]
        if sum(widths) + 3 * len(widths) + 1 <= width:
            break
    shown = Table(title="Accuracy in percent", title_justify="left", caption_justify="left")
    shown.add_column("method", no_wrap=True)
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(table):
        last = i + 1 == len(table) or table[i + 1].base != row.base
        shown.add_row(row.label, *cells[i], end_section=last)
    if not tasks:
        shown.caption = "The terminal is too narrow for the tasks; the written table has them."
    return shown


def caption(table: Sequence[Row]) -> str:
    """What the numbers are, in one or two sentences."""
    most = max(len(row.seeds) for row in table)
    few = "" if len({len(row.seeds) for row in table if row.seeds}) < 2 else "up to "
    text = "Accuracy in percent"
    text += f", mean ± standard deviation over {few}{most} seeds" if most > 1 else ""
    text += ". Extra parameters: beyond one merged model, over all tasks."
    if any(row.gap_closed for row in table):
        text += " Gap closed: the share of the way from the merge to the experts."
    return text


def best_repairs(table: Sequence[Row]) -> set[tuple[str | None, str, str | None]]:
    """(base, column, method) of the best repair in each column, where a base has several."""
    best = set()
    for base in dict.fromkeys(row.base for row in table if row.kind == "repair"):
        repairs = [row for row in table if row.kind == "repair" and row.base == base]
        if len(repairs) < 2:
            continue
        for name in repairs[0].accuracy:
            winner = max(repairs, key=lambda row: row.accuracy[name].mean)
            best.add((base, name, winner.method))
        best.add((base, "average", max(repairs, key=lambda row: row.average.mean).method))
    return best


def _row(
    key: tuple[str, str | None, str | None],
    results: list[Result],
    tasks: Sequence[str],
    merge: float | None,
    experts: float | None,
) -> Row:
    kind, base, method = key
    results = sorted(results, key=lambda r: -1 if r.seed is None else r.seed)
    gap = None
    if kind == "repair" and merge is not None and experts is not None and experts > merge:
        gap = Stat(tuple((r.average - merge) / (experts - merge) for r in results))
    seconds = tuple(r.seconds for r in results if r.seconds is not None)
    return Row(
        kind,
        base,
        method,
        seeds=tuple(r.seed for r in results if r.seed is not None),
        accuracy={task: Stat(tuple(r.accuracy[task] for r in results)) for task in tasks},
        average=Stat(tuple(r.average for r in results)),
        gap_closed=gap,
        extra_parameters=results[0].extra_parameters,
        seconds=Stat(seconds) if seconds else None,
        images_used=results[0].images_used,
        transductive=results[0].transductive,
    )


def _average(
    groups: dict[tuple[str, str | None, str | None], list[Result]],
    key: tuple[str, str | None, str | None],
) -> float | None:
    return groups[key][0].average if key in groups else None


def _tail(row: Row) -> list[str]:
    extra = NONE if row.extra_parameters is None else count(row.extra_parameters)
    gap = NONE if row.gap_closed is None else f"{percent(row.gap_closed.mean, digits=0)}%"
    return [extra, gap, duration(row.seconds.mean if row.seconds else None)]
