"""The ``intervmerge`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .config import ArtifactError, ConfigError
from .deploy import command as export
from .deploy import push_command as hub
from .report import command as report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``intervmerge``; those of the process where None.

    Returns:
        The exit code: 0, or 2 where the input is at fault, which one line on stderr explains.
    """
    parser = argparse.ArgumentParser(
        prog="intervmerge", description="Reports of finished runs, and saved models for elsewhere."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (report, export, hub):
        room.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ConfigError, ArtifactError) as error:
        print(f"intervmerge: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
