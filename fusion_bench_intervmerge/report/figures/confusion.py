"""Which task is taken for which, if a task pool scored all tasks' images in one stream."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from ..formatting import readable
from ..runs import Evaluation
from ..style import Palette, Picture, blank, finish, squares

_FEW = 3  # models that are shown; of each the first seed


def draw(of: Evaluation, palette: Palette) -> Iterator[Picture]:
    """One figure per model that has a router: a square per pair of tasks."""
    routed = [
        (run, name)
        for run in of.runs
        for name, report in run.reports.items()
        if "routed" in report.get("average", {})
        and (run.models[name].seed or 0) == min(m.seed or 0 for m in run.models.values())
    ]
    for number, (run, name) in enumerate(routed[:_FEW]):
        counts = pd.DataFrame(run.reports[name]["confusion"]).T
        columns = [*run.tasks, *(["none"] if "none" in counts else [])]
        counts = counts.reindex(index=run.tasks, columns=columns).fillna(0).astype(int)
        right = counts.to_numpy().diagonal().sum() / counts.to_numpy().sum()
        figure, (panel,) = blank(high=0.32 * len(counts) + 0.7)
        shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0).to_numpy()
        squares(panel, counts, shares, lambda images: str(images) if images else "")
        yield Picture(
            "confusion" + (f"_{number}" if number else ""),
            "Which task is taken for which" + (f" ({readable(name)})" if len(routed) > 1 else ""),
            f"Images of the task at the left that the router takes for the one below: {right:.1%} "
            "are recognised.",
            finish(figure),
        )
