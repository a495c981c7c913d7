"""The figures of every analysed merge, which lie in the files of the analyses themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ... import analysis
from ...errors import ConfigError
from ..runs import ANALYSIS, LAYOUT, Analysis, Evaluation, reason
from ..style import Canvas
from ..words import readable
from . import Picture

PLACE = 50


def pictures(of: Evaluation) -> Iterator[Picture]:
    """Of every merge in turn; its name and its run's are told where there are several."""
    found = []
    for number, run in enumerate(of.runs):
        for merge, analysed in run.analysis.items():
            with _layout_of(run.folder / ANALYSIS):
                drawings = list(of_merge(analysed))  # those of merges that are not shown too
            if merge in of.bases or not run.accuracies:
                found.append((number, run, merge, drawings))
    several = len({merge for _, _, merge, _ in found}) > 1
    for number, run, merge, drawings in found:
        suffix, words = (f"-{merge}", [readable(merge)]) if several else ("", [])
        if len(of.runs) > 1:
            suffix, words = f"{suffix}-{number}", [*words, run.name]
        title = f" ({', '.join(words)})" if words else ""
        for one in drawings:
            name = re.sub(r"[^\w-]", "_", one.name + suffix)
            make = partial(_drawn, run.folder / ANALYSIS, one.make)
            yield replace(one, name=name, title=one.title + title, make=make, file=name)


def of_merge(found: Analysis) -> Iterator[Picture]:
    """The figures of what was analysed of a merge."""
    for name, module in analysis.modules().items():
        if name in found and hasattr(module, "figures"):
            yield from (Picture(*one) for one in module.figures(found))


def _drawn(file: Path, make: Callable[[Canvas], Figure], canvas: Canvas) -> Figure:
    with _layout_of(file):
        return make(canvas)


@contextmanager
def _layout_of(file: Path) -> Iterator[None]:
    """What cannot be drawn is laid out in another way than the analysis wrote it."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        problem = f"is not laid out as expected ({reason(error)})"
        raise ConfigError(str(file), problem, LAYOUT) from error
