"""What a run says of itself: first what it is going to do, and last whether it helped."""

from __future__ import annotations

import atexit
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table

from ..config import ConfigError
from ..report import tables
from ..report.runs import Evaluation, gather, read_run


def announce(*lines: str) -> None:
    """Print what is going to be done, one statement per line."""
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line)


def summarize_at_exit(folder: str | Path | None) -> None:
    """Print ``summary`` once FusionBench has printed its own report, at the end of the process.

    Not for the jobs of a sweep, which has a summary of its own, and not outside of a Hydra run.
    """
    if folder is None or not HydraConfig.initialized():
        return
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        atexit.register(summary, Path(folder))


def summary(folder: Path) -> None:
    """Print the accuracies of a run, which images it saw, where its files are, and what is next.

    Args:
        folder: the run's; without a report in it, nothing is printed.
    """
    try:
        evaluation = gather([read_run(folder)])
    except ConfigError:
        return  # the run did not get that far, and has said why
    if not evaluation.rows:
        return
    console = Console(highlight=False)
    few = len(evaluation.rows) <= 4  # tasks down, which fits into any terminal
    console.print(by_task(evaluation) if few else tables.to_terminal(evaluation, console))
    for row in evaluation.repairs if few else ():
        numbers = int(row.extra_parameters or 0)
        console.print(f"{row.label}: {numbers:,} extra parameters over all tasks")
    splits = {row.transductive for row in evaluation.repairs}
    if True in splits:
        console.print("Transductive: found on unlabelled images of the very split it is tested on.")
        console.print("For a held-out result: method.data.split=train")
    elif splits == {False}:
        console.print("Held-out: none of the images it was found on is tested.")
    plain = Console(soft_wrap=True, highlight=False)
    plain.print(f"Results: {folder}; a page with figures: intervmerge report {folder}")
    saved = [path.parent.name for path in folder.glob("*/interventions")]
    if saved:
        plain.print(f"Model: {folder / saved[0]}; for elsewhere: intervmerge export")
    else:
        plain.print("To keep the model: \"method.save_to='{log_dir}/intervmerge'\"", markup=False)


def by_task(evaluation: Evaluation) -> Table:
    """Accuracy in percent, one line per task and one column per model."""
    table = Table("accuracy, %", *map(tables.label, evaluation.rows))
    for column in table.columns[1:]:
        column.justify = "right"
    for task in [*evaluation.tasks, "average"]:
        shares = [f"{100 * row.mean[task]:.1f}" for row in evaluation.rows]
        table.add_row(task, *shares, end_section=task == evaluation.tasks[-1])
    return table
