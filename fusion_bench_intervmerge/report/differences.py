"""Differences of accuracy between models that answered the same images, with their errors.

Two models are right and wrong on mostly the same images, so their difference is known better than
either accuracy. Images are drawn by task, seeds by method; with d the difference of right answers,
the variance of the mean over tasks is::

    sum over tasks  var_images(mean_seeds d) / images / tasks²   +   var_seeds(mean d) / seeds

and the interval is Student's, with the degrees of freedom of Welch and Satterthwaite.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit  # scipy.stats takes a second to import

from .runs import Evaluation, Row

Right = dict[str, NDArray[np.float64]]  # task -> (seeds, images), 1 if right


class Difference(NamedTuple):
    """A share, and half of its 95 % interval."""

    mean: float
    half: float


def right_answers(evaluation: Evaluation, row: Row) -> Right | None:
    """Which images a row's models have right; None if the runs kept no answers."""
    answers = [(evaluation.runs[run].answers, name) for run, name in row.models]
    if not all(kept and name in kept.models for kept, name in answers):
        return None
    own = {
        task: [kept.right(name, task) for kept, name in answers if kept]
        for task in evaluation.tasks
    }
    same = all(len({len(each) for each in seeds}) == 1 for seeds in own.values())
    return {task: np.stack(seeds).astype(float) for task, seeds in own.items()} if same else None


def difference(first: Right, second: Right) -> Difference | None:
    """Accuracy of the first less that of the second, mean over tasks.

    Seeds are compared one by one; one seed stands for all if the other has several. None if the
    images or the seeds differ.
    """
    tasks = list(first)
    if tasks != list(second):
        return None
    for task in tasks:
        one, two = first[task].shape, second[task].shape
        if one[1] != two[1] or (one[0] != two[0] and 1 not in (one[0], two[0])):
            return None
    parts = [first[task] - second[task] for task in tasks]
    by_seed = np.mean([part.mean(axis=1) for part in parts], axis=0)
    terms = [
        (part.mean(axis=0).var(ddof=1) / part.shape[1] / len(tasks) ** 2, part.shape[1] - 1)
        for part in parts
        if part.shape[1] > 1
    ]
    if len(by_seed) > 1:
        terms.append((by_seed.var(ddof=1) / len(by_seed), len(by_seed) - 1))
    variance = sum(term for term, _ in terms)
    if not variance:
        return Difference(float(by_seed.mean()), 0.0)
    freedom = variance**2 / sum(term**2 / free for term, free in terms)
    half = stdtrit(freedom, 0.975) * np.sqrt(variance)
    return Difference(float(by_seed.mean()), float(half))


def to_best(evaluation: Evaluation) -> dict[int, Difference]:
    """For each repair but the best of its merge, how far it is below that: row -> difference."""
    found = {}
    for base in evaluation.bases:
        rows = [row for row in evaluation.repairs if row.base == base]
        best = max(rows, key=lambda row: row.mean["average"], default=None)
        if best is None or (reference := right_answers(evaluation, best)) is None:
            continue
        for place, row in enumerate(evaluation.rows):
            own = right_answers(evaluation, row) if row in rows and row is not best else None
            if own is not None and (below := difference(reference, own)) is not None:
                found[place] = below
    return found


def pairs(evaluation: Evaluation) -> pd.DataFrame:
    """Every two repairs of each merge, in percent; no lines if the runs kept no answers."""
    lines = []
    for base in evaluation.bases:
        rows = [row for row in evaluation.rows if row.base == base]
        known = [(row, right) for row in rows if (right := right_answers(evaluation, row))]
        for (one, first), (two, second) in combinations(known, 2):
            if (found := difference(second, first)) is not None:
                line = {
                    "base": base,
                    "method": two.method or two.kind,
                    "than": one.method or one.kind,
                }
                ends = {"low": found.mean - found.half, "high": found.mean + found.half}
                numbers = {"difference": found.mean, **ends}
                lines.append(line | {name: 100 * value for name, value in numbers.items()})
    return pd.DataFrame(lines)
