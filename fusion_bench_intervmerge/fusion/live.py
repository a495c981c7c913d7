"""Figures of a run in progress, for loggers that show pictures (FusionBench's TensorBoard does).

Accuracies are known only after the task pool ran; here are training curves, how close the features
came to the experts', and analyses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L

from ..results import Result as Facts

Losses = Mapping[str, Sequence[float]]  # task -> the loss at each step


def show_repair(fabric: L.Fabric, losses: Losses, features: Mapping[str, Any]) -> None:
    """A single run: its losses, and its features' distance to the experts' before and after."""
    if boards := list(_boards(fabric)):
        from ..report import Result, Study, figures

        study = Study([], [Result("repair", {}, 0.0, losses=_lists(losses))], [])
        _add(boards, "training", figures.training_curves(study, []))
        _add(boards, "features", figures.features(features))


def show_comparison(
    fabric: L.Fabric,
    models: Iterable[Facts],
    base: str,
    analysis: Mapping[str, Any],
) -> None:
    """A comparison after one more merge.

    Args:
        fabric: whose loggers.
        models: what there is so far.
        base: the merge's name.
        analysis: what its analyses found: analysis -> task -> encoder -> value.
    """
    if boards := list(_boards(fabric)):
        from ..report import Result, Study, analysis_figures, figures, rows

        results = [
            Result("repair", {}, 0.0, one.base, one.method, one.seed, losses=one.losses)
            for one in models
            if one.losses
        ]
        study = Study([], results, [])
        _add(boards, "training", figures.training_curves(study, rows(study)))
        for drawing in analysis_figures.drawings(analysis):
            _add(boards, f"{base}/{drawing.name}", drawing.draw(analysis_figures.WIDE))


def _boards(fabric: L.Fabric) -> Iterator[Any]:
    for logger in fabric.loggers if fabric.is_global_zero else []:
        board = getattr(logger, "experiment", None)
        if hasattr(board, "add_figure"):
            yield board


def _add(boards: Sequence[Any], name: str, figure: Any) -> None:
    from ..report.drawing import style

    for board in boards if figure is not None else []:
        with style():
            board.add_figure(name, figure)


def _lists(losses: Losses) -> dict[str, list[float]]:
    return {task: list(values) for task, values in losses.items()}
