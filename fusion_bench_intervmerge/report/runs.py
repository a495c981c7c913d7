"""What runs wrote into their folders, as plain values."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ..errors import ConfigError
from ..results import FILE as DETAILS
from ..results import Result as Facts
from ..results import parse_results
from .analysis import Analysis, read_analysis

REPORT, ANALYSIS = "program_report.json", "analysis.json"
_EXPECTED = "a run folder of `fusion_bench method=intervmerge/compare` or `method=intervmerge`"
# Two runs on one pool may evaluate a reference on different hardware; more than this is another
# pool, or another merge under the same name.
_SAME_REFERENCE = 0.005


@dataclass(frozen=True)
class Result:
    """One evaluated model.

    Attributes:
        kind: ``pretrained``, ``experts``, ``merge`` or ``repair``.
        accuracy: task -> share of test images classified right, in [0, 1].
        average: mean accuracy over tasks, in [0, 1].
        base: the merging method; None for pretrained and experts.
        method: the repair; None for everything else.
        seed: the repair's seed.
        extra_parameters: what inference needs beyond one merged model, over all tasks.
        seconds: wall-clock time of merging or repairing.
        images_used: in words, which images the edits were found on, without the seed.
        transductive: whether those are of the test split.
        losses: task -> the loss at each step; empty where the run did not keep it.
    """

    kind: str
    accuracy: dict[str, float]
    average: float
    base: str | None = None
    method: str | None = None
    seed: int | None = None
    extra_parameters: int | None = None
    seconds: float | None = None
    images_used: str | None = None
    transductive: bool | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[Any, ...]:
        """Equal for two results that differ by their seed alone."""
        return (self.extra_parameters, self.transductive, self.images_used)


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        tasks: in the pool's order.
        results: every model it evaluated.
        command: the command line that started it, where Hydra's files tell.
        config: its composed configuration, YAML; likewise.
        features: task -> ``bias_before``, ``bias_after`` (mean L1 to the expert's features) and
            perhaps ``agreement_before``, ``agreement_after`` (shares); of single runs.
        analysis: merge -> analysis -> task -> encoder -> value; empty where nothing was analysed.
    """

    folder: Path
    tasks: list[str]
    results: list[Result]
    command: str | None = None
    config: str | None = None
    features: dict[str, dict[str, float]] = field(default_factory=dict)
    analysis: dict[str, Analysis] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The results of one run or more, on the same tasks.

    Attributes:
        tasks: in the pool's order.
        results: every model once; ``method`` carries ``@folder`` where two runs gave one name to
            different things.
        runs: the runs they came from.
    """

    tasks: list[str]
    results: list[Result]
    runs: list[Run]

    @property
    def bases(self) -> list[str]:
        """The merging methods, in the order of the runs."""
        return list(dict.fromkeys(r.base for r in self.results if r.base is not None))


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Args:
        folder: holds ``program_report.json`` and ``intervmerge.json``, or ``analysis.json`` alone,
            of a model that no task pool evaluated.

    Raises:
        ConfigError: no such folder, no report, broken JSON, or another layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(str(folder), "no such folder", _EXPECTED)
    report = _read_json(folder / REPORT)
    analysed = _read_json(folder / ANALYSIS)
    analysis = {} if analysed is None else read_analysis(analysed, folder / ANALYSIS)
    hydra = _Hydra(folder)
    if report is None and analysed is not None:
        tasks = list(map(str, analysed.get("tasks", [])))
        return Run(folder, tasks, [], hydra.command(), hydra.config(), analysis=analysis)
    if report is None:
        raise ConfigError(
            str(folder), f"has no {REPORT}; the run is not finished, or is no run", _EXPECTED
        )
    details = _read_json(folder / DETAILS)
    if details is None:
        raise ConfigError(str(folder), f"has no {DETAILS} beside its {REPORT}", _EXPECTED)
    known = parse_results(details, str(folder / DETAILS))
    tasks, features = known.tasks, {}
    try:
        results = [_result(tasks, report, name, facts) for name, facts in known.models.items()]
        features = next((f.features for f in known.models.values() if f.features), {})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            str(folder / REPORT), f"is not laid out as expected ({_reason(error)})", _EXPECTED
        ) from None
    if not tasks or not results:
        raise ConfigError(str(folder / REPORT), "holds no results", _EXPECTED)
    return Run(
        folder,
        tasks,
        results,
        command=hydra.command(),
        config=hydra.config(),
        features=features,
        analysis=analysis,
    )


def gather(runs: Sequence[Run], bases: Sequence[str] = ()) -> Study:
    """Put the runs' results together: seeds of one method meet, references are kept once.

    Args:
        runs: one or more.
        bases: the merging methods to keep; all where empty.

    Raises:
        ConfigError: the runs are of different tasks or pools, or a base is in none of them.
    """
    first = runs[0]
    kept: list[Result] = []
    for run in runs:
        if set(run.tasks) != set(first.tasks):
            raise ConfigError(
                str(run.folder),
                f"its tasks are not those of {first.folder}",
                "runs on the same tasks; report others apart",
            )
        for result in run.results:
            if bases and result.base is not None and result.base not in bases:
                continue
            if result.kind != "repair":
                _add_reference(kept, result, run.folder)
        repairs: dict[tuple[str | None, str | None], list[Result]] = {}
        for result in run.results:
            if result.kind == "repair" and (not bases or result.base in bases):
                repairs.setdefault((result.base, result.method), []).append(result)
        for seeds in repairs.values():
            _add_repair(kept, seeds, run.folder)
    study = Study(first.tasks, kept, list(runs))
    for base in bases:
        if base not in study.bases:
            known = dict.fromkeys(r.base for run in runs for r in run.results if r.base)
            raise ConfigError("--base", f"no run has {base!r}", ", ".join(known))
    return study


def _add_reference(kept: list[Result], result: Result, folder: Path) -> None:
    for other in kept:
        if (other.kind, other.base) == (result.kind, result.base):
            if abs(other.average - result.average) > _SAME_REFERENCE:
                raise ConfigError(
                    str(folder),
                    f"{result.base or result.kind!s} has an average accuracy of "
                    f"{result.average:.1%} there, and of {other.average:.1%} in another run",
                    "runs on the same pool; report others apart",
                )
            return
    kept.append(result)


def _add_repair(kept: list[Result], seeds: list[Result], folder: Path) -> None:
    """Add one method's seeds: to those of another run, or under a name of their own."""
    name, own = seeds[0].method, f"{seeds[0].method}@{folder.resolve().name}"
    for attempt in range(len(kept) + 2):
        method = [name, own][attempt] if attempt < 2 else f"{own}-{attempt}"
        known = [r for r in kept if (r.base, r.method) == (seeds[0].base, method)]
        by_seed = {r.seed: r for r in known}
        fresh = [r for r in seeds if r.seed not in by_seed]
        again = [r for r in seeds if r.seed in by_seed]
        if all(r.accuracy == by_seed[r.seed].accuracy for r in again) and all(
            r.settings == known[0].settings for r in seeds if known
        ):
            kept.extend(replace(r, method=method) for r in fresh)
            return


def _result(tasks: Sequence[str], report: Mapping[str, Any], name: str, facts: Facts) -> Result:
    # a run of one model reports it alone, others by name
    accuracy, average = _accuracy(tasks, report if tasks[0] in report else report[name], name)
    images = "; ".join(images.in_words(seed=False) for images in facts.images)
    return Result(
        facts.kind,
        accuracy,
        average,
        base=facts.base,
        method=facts.method,
        seed=facts.seed,
        extra_parameters=facts.extra_parameters,
        seconds=facts.seconds,
        images_used=images or None,
        transductive=facts.transductive,
        losses=facts.losses,
    )


def _accuracy(
    tasks: Sequence[str], report: Mapping[str, Any], name: str
) -> tuple[dict[str, float], float]:
    accuracy = {task: report[task]["accuracy"] for task in tasks}
    for task, value in accuracy.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name}: the accuracy of {task} is {value!r}, which is no share")
    return accuracy, float(np.mean(list(accuracy.values())))


def _read_json(path: Path) -> dict[str, Any] | None:
    """The file's content, None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", _EXPECTED) from None
    except ValueError as error:
        raise ConfigError(str(path), f"is broken JSON ({error})", _EXPECTED) from None
    if not isinstance(value, dict):
        raise ConfigError(str(path), "is not laid out as expected", _EXPECTED)
    return value


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


class _Hydra:
    """What Hydra kept of a run's command line and configuration, wherever it put it."""

    def __init__(self, folder: Path):
        places = (
            folder,
            folder / ".hydra",
            folder / "hydra_output",
            folder / "hydra_output/.hydra",
        )
        self._folder = next((p for p in places if (p / "overrides.yaml").is_file()), None)

    def command(self) -> str | None:
        overrides = self._load("overrides.yaml")
        if not isinstance(overrides, list):
            return None
        name = self._job().get("config_name") or "fabric_model_fusion"
        flags = [] if name == "fabric_model_fusion" else ["--config-name", str(name)]
        return shlex.join(["fusion_bench", *flags, *map(str, overrides)])

    def config(self) -> str | None:
        try:
            return (self._folder / "config.yaml").read_text("utf-8") if self._folder else None
        except OSError:
            return None

    def _job(self) -> dict[str, Any]:
        return self._hydra().get("job") or {}

    def _hydra(self) -> dict[str, Any]:
        found = self._load("hydra.yaml")
        return (found.get("hydra") or {}) if isinstance(found, dict) else {}

    def _load(self, name: str) -> Any:
        if self._folder is None:
            return None
        # These files only add to a report: without them it is poorer, not wrong.
        try:
            return OmegaConf.to_container(OmegaConf.load(self._folder / name), resolve=False)
        except Exception:
            return None
