"""A progress bar for a terminal; nothing at all in a log file."""

from __future__ import annotations

import lightning as L
from tqdm.auto import tqdm


def bar(fabric: L.Fabric, name: str, total: int, done: int = 0) -> tqdm:
    """A bar on stderr, in the first process alone."""
    hidden = None if fabric.is_global_zero else True  # None: where there is no terminal
    return tqdm(desc=name, total=total, initial=done, disable=hidden, dynamic_ncols=True)
