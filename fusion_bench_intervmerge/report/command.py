"""``intervmerge report``."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    what = "Write tables, figures and one self-contained HTML page about runs of "
    what += "`fusion_bench method=intervmerge/compare` and `method=intervmerge`."
    short = "tables, figures and one HTML page"
    report = commands.add_parser("report", help=short, description=what)
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument("--to", metavar="FOLDER", help="default: report, in the first run's folder")
    base = "report this merging method only, by its name in the run; may be given several times"
    report.add_argument("--base", action="append", default=[], metavar="NAME", help=base)
    report.add_argument("--title", default="IntervMerge report", help="of the page")
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the report."""
    from .page import write_report

    console = Console()
    folder = write_report(options.runs, options.to, options.base, options.title, console)
    # soft_wrap: a path that is broken over lines cannot be copied
    console.print(f"The report is in {folder / 'report.html'}", soft_wrap=True, highlight=False)
