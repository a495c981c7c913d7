"""Where this package keeps what it builds once and reads many times."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "FUSION_BENCH_INTERVMERGE_CACHE"


def cache_root() -> Path:
    """The cache folder: ``$FUSION_BENCH_INTERVMERGE_CACHE``, else the user's own cache folder.

    Returns:
        An absolute path; the folder itself is made by whoever writes into it.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "fusion-bench-intervmerge"
