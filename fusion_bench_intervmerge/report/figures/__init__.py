"""The figures of a report, in the order of its page.

A figure's function draws what there is of an evaluation, or of a study. To add one, write it beside
these and name it in one of the two lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..runs import Evaluation
from ..study import Study
from ..style import Palette, Picture, style
from . import accuracy, analyses, confusion, studies, training

EVALUATION: list[Callable[[Evaluation, Palette], Iterator[Picture]]] = [
    accuracy.by_bytes,
    accuracy.by_parameters,
    accuracy.by_task,
    confusion.draw,
    training.losses,
    training.features,
    analyses.draw,
]
STUDY: list[Callable[[Study], Iterator[Picture]]] = [studies.curves, studies.side_by_side]


def draw_evaluation(evaluation: Evaluation) -> list[Picture]:
    """The figures of an evaluation."""
    palette = Palette(evaluation.methods)
    with style():
        return [picture for draw in EVALUATION for picture in draw(evaluation, palette)]


def draw_study(study: Study) -> list[Picture]:
    """The figures of a study."""
    with style():
        return [picture for draw in STUDY for picture in draw(study)]
