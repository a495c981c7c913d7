"""The ``fusion_bench`` command without the seconds of its imports: a fork of this process."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def fusion_bench(folder: Path, *arguments: str) -> tuple[int, str]:
    """Enter at the command's own ``main`` in a process of its own.

    Args:
        folder: the current directory there.
        arguments: of the command line, overrides last.

    Returns:
        Exit status, and what the screen showed, both streams together.
    """
    from fusion_bench.scripts.cli import _hydra_main
    from hydra.core.global_hydra import GlobalHydra

    import fusion_bench_intervmerge.fusion  # noqa: F401

    sys.stdout.flush()
    with tempfile.TemporaryFile("w+", errors="replace") as screen:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(screen.fileno(), 1)
                os.dup2(screen.fileno(), 2)
                os.chdir(folder)
                GlobalHydra.instance().clear()
                sys.argv = ["fusion_bench", *arguments]
                _hydra_main()
                status = 0
            except SystemExit as end:
                if isinstance(end.code, str):  # as Python itself ends
                    print(end.code, file=sys.stderr)
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        screen.seek(0)
        return os.waitstatus_to_exitcode(status), screen.read()
