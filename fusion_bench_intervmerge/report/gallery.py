"""Images that a merge gets wrong and its best repair right, for a page to look at."""

from __future__ import annotations

import base64
from typing import NamedTuple

import numpy as np

from .answers import Answers
from .runs import Evaluation, Row

SHOWN = 6  # images per task


class Shown(NamedTuple):
    """An image as a data URI, its class, and what the merge took it for."""

    source: str
    label: str
    merged: str


class Task(NamedTuple):
    """One task: accuracies before and after, how many images changed sides, and some of them."""

    name: str
    before: float
    after: float
    mended: int
    spoilt: int
    images: list[Shown]


class Gallery(NamedTuple):
    """One merge and its best repair."""

    base: str
    repair: Row
    tasks: list[Task]


def gallery(evaluation: Evaluation) -> list[Gallery]:
    """A gallery for each merge whose run kept images; the best repair's first seed is shown."""
    galleries = []
    for base in evaluation.bases:
        merge = next((r for r in evaluation.rows if (r.kind, r.base) == ("merge", base)), None)
        repairs = [row for row in evaluation.repairs if row.base == base]
        best = max(repairs, key=lambda row: row.mean["average"], default=None)
        if merge is None or best is None:
            continue
        run, name = best.models[0]
        before = next((name for at, name in merge.models if at == run), merge.models[0][1])
        answers = evaluation.runs[run].answers
        if answers and answers.images and {before, name} <= answers.models.keys():
            tasks = [_task(answers, task, before, name) for task in evaluation.tasks]
            galleries.append(Gallery(base, best, tasks))
    return galleries


def _task(answers: Answers, task: str, merge: str, repair: str) -> Task:
    before, after = answers.right(merge, task), answers.right(repair, task)
    mended = np.flatnonzero(after & ~before)
    images = answers.images.get(task, {})
    names = answers.classes.get(task)

    def named(index: int) -> str:
        return names[index] if names else f"class {index}"

    shown = [
        Shown(
            f"data:image/png;base64,{base64.b64encode(images[i]).decode()}",
            named(answers.labels[task][i]),
            named(answers.models[merge][task][i]),
        )
        for i in [i for i in mended.tolist() if i in images][:SHOWN]
    ]
    counts = len(mended), int((before & ~after).sum())
    return Task(task, float(before.mean()), float(after.mean()), *counts, shown)
