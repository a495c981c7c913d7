"""The ``intervmerge`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from .. import __version__
from ..errors import ConfigError
from .page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``intervmerge``; those of the process where None.

    Returns:
        The exit code: 0, or 2 where the input is at fault, which one line on stderr explains.
    """
    parser = argparse.ArgumentParser(prog="intervmerge", description="Reports of finished runs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="tables, figures and one HTML page",
        description="Write tables, figures and one self-contained HTML page about runs of "
        "`fusion_bench method=intervmerge/compare` and `method=intervmerge`.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument("--to", metavar="FOLDER", help="default: report, in the first run's folder")
    report.add_argument(
        "--base",
        action="append",
        default=[],
        metavar="NAME",
        help="report this merging method only, by its name in the run; may be given several times",
    )
    report.add_argument("--title", default="IntervMerge report", help="of the page")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        folder = write_report(options.runs, options.to, options.base, options.title, console)
    except ConfigError as error:
        print(f"intervmerge: {error}", file=sys.stderr)
        return 2
    # soft_wrap: a path that is broken over lines cannot be copied
    console.print(f"The report is in {folder / 'report.html'}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
