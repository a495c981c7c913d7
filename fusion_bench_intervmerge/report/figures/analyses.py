"""The figures of every analysed merge, which lie in the files of the analyses themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ... import analysis
from ..formatting import readable
from ..runs import ANALYSIS, LAYOUT, Evaluation, laid_out_otherwise
from . import Picture

PLACE = 50


def pictures(of: Evaluation) -> Iterator[Picture]:
    """Of every merge in turn; its name and its run's are told where there are several."""
    found = []
    for number, run in enumerate(of.runs):
        for merge, analysed in run.analysis.items():
            try:
                drawings = list(of_merge(analysed))  # those of merges that are not shown too
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise laid_out_otherwise(run.folder / ANALYSIS, error, LAYOUT) from error
            if merge in of.bases or not run.reports:
                found.append((number, run, merge, drawings))
    several = len({merge for _, _, merge, _ in found}) > 1
    for number, run, merge, drawings in found:
        suffix, words = (f"-{merge}", [readable(merge)]) if several else ("", [])
        if len(of.runs) > 1:
            suffix, words = f"{suffix}-{number}", [*words, run.name]
        title = f" ({', '.join(words)})" if words else ""
        for one in drawings:
            name = re.sub(r"[^\w-]", "_", one.name + suffix)
            yield replace(one, name=name, title=one.title + title, file=name)


def of_merge(found: analysis.Found) -> Iterator[Picture]:
    """The figures of what was analysed of a merge."""
    for name, module in analysis.modules().items():
        if name in found and hasattr(module, "figures"):
            yield from (Picture(*one) for one in module.figures(found))
