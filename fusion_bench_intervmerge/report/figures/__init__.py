"""The figures of a report: a file a subject, found by walking this package.

A module draws what is given to it: it has ``PLACE``, its place in the page, and ``pictures``, from
an ``Evaluation`` or a ``Study`` (its annotation says which) to what there is to draw. To add a
figure, put a module beside these; nothing else changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_type_hints

from matplotlib.figure import Figure

from ...registry import names_in
from ..runs import Evaluation
from ..study import Study
from ..style import WIDE, Canvas, Palette, style


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    Attributes:
        name: its anchor in a page.
        title, text: its heading, and what it shows.
        make: draws it.
        file: under which name it lies beside the page; empty: nowhere.
    """

    name: str
    title: str
    text: str
    make: Callable[[Canvas], Figure]
    file: str = ""

    def draw(self, palette: Palette, width: float = WIDE) -> Figure:
        """The figure, for a width in inches."""
        with style():
            return self.make(Canvas(width, palette))


def pictures(subject: Evaluation | Study) -> Iterator[Picture]:
    """The figures of it, in the order of a page."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names_in(__path__)]
    for module in sorted(modules, key=lambda module: module.PLACE):
        if isinstance(subject, get_type_hints(module.pictures)["of"]):
            yield from module.pictures(subject)
