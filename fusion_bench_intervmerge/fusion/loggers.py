"""Figures of a run in progress, for loggers that show pictures (FusionBench's TensorBoard does).

Accuracies are known only after the task pool ran; here are training curves, how close the features
came to the experts', and analyses.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning as L

from ..config import Json
from ..results import Result


def show(
    fabric: L.Fabric,
    models: Iterable[Result],
    base: str = "",
    analysis: Json | None = None,
) -> None:
    """The models so far: their losses, and their features' distance to the experts'.

    Args:
        fabric: whose loggers.
        models: repairs; others have nothing to show.
        base: name of the merge whose analyses are shown too.
        analysis: what they found: analysis -> task -> encoder -> value.
    """
    loggers = fabric.loggers if fabric.is_global_zero else []
    boards = [logger.experiment for logger in loggers if hasattr(logger, "experiment")]
    if not any(hasattr(board, "add_figure") for board in boards):
        return
    from ..report.figures import analyses, training
    from ..report.runs import Evaluation, Run
    from ..report.style import Palette, style

    run = Run(Path(), [], {str(number): model for number, model in enumerate(models)})
    evaluation = Evaluation([], run.table(), [run])
    pictures = {p.name.removesuffix("-0"): p for p in training.pictures(evaluation)}
    pictures |= {f"{base}/{p.name}": p for p in analyses.of_merge(analysis or {})}
    for name, picture in pictures.items():
        figure = picture.draw(Palette(evaluation.methods))
        for board in boards:
            if hasattr(board, "add_figure"):
                with style():
                    board.add_figure(name, figure)
