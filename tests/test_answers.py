"""What models answered for each image: paired differences, their intervals, and the gallery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.report.answers import FILE, Answers, read_answers
from fusion_bench_intervmerge.report.differences import difference


def drawn(random: np.random.Generator, seeds: int, images: int, chance: float) -> np.ndarray:
    return (random.random((seeds, images)) < chance).astype(float)


def test_one_task_and_seed_is_the_paired_t_test():
    random = np.random.default_rng(0)
    one, two = drawn(random, 1, 300, 0.8), drawn(random, 1, 300, 0.7)
    mean, half = difference({"a": one}, {"a": two})
    low, high = stats.ttest_rel(one[0], two[0]).confidence_interval(0.95)
    assert mean == pytest.approx(one.mean() - two.mean())
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    """Images are easy or hard for both, seeds have an effect of their own, tasks differ."""
    random, hits, truth, tries = np.random.default_rng(0), 0, 0.1, 400
    for _ in range(tries):
        first, second = {}, {}
        moved = random.normal(0, 0.03, (3, 1))
        for task, chance in {"a": 0.5, "b": 0.7}.items():
            easy = random.uniform(-0.2, 0.2, 150)
            luck = random.random((3, 150))  # a seed's draw, the same for both
            first[task] = (luck < chance + truth + easy + moved).astype(float)
            second[task] = (luck < chance + easy).astype(float)
        mean, half = difference(first, second)
        hits += abs(mean - truth) <= half
    assert 0.92 <= hits / tries <= 0.99


def test_one_seed_stands_for_all_and_other_images_cannot_be_paired():
    random = np.random.default_rng(1)
    one, three = drawn(random, 1, 50, 0.5), drawn(random, 3, 50, 0.5)
    assert difference({"a": one}, {"a": three}).mean == pytest.approx(one.mean() - three.mean())
    assert difference({"a": one}, {"a": one}) == (0.0, 0.0)
    assert difference({"a": three}, {"a": three[:2]}) is None
    assert difference({"a": one}, {"a": one[:, :40]}) is None
    assert difference({"a": one}, {"b": one}) is None


def test_answers_are_read_as_they_were_written(tmp_path: Path):
    answers = Answers({"a.b": ["cat", "dog"]}, {"a.b": np.array([0, 1, 1], np.int32)})
    answers.models["merge/x"] = {"a.b": np.array([0, 0, 0], np.int32)}
    items = [{"image": Image.new("L", (300, 10), 255)}] * 3
    answers.keep_images("merge/x", {"a.b": items})
    answers.write(tmp_path)
    read = read_answers(tmp_path)
    assert read.classes == answers.classes and read.images == answers.images
    assert set(read.images["a.b"]) == {1, 2}  # those that it gets wrong
    assert read.right("merge/x", "a.b").tolist() == [True, False, False]
    (tmp_path / FILE).write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_answers(tmp_path)
    assert read_answers(tmp_path / "elsewhere") is None
