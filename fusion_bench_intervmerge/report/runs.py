"""Run folders, and the models of several runs side by side."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from .. import results
from ..config import ConfigError, Json
from . import formatting
from .answers import Answers, read_answers

REPORT, ANALYSIS = "program_report.json", "analysis.json"
_EXPECTED = "a run folder of `fusion_bench method=intervmerge/compare` or `method=intervmerge`"
LAYOUT = "merges: {MERGE: {ANALYSIS: {TASK: {ENCODER: value}}}}"  # of analysis.json
# Two runs on one pool may evaluate a reference on different hardware; more than this is another
# pool, or another merge under the same name.
_SAME_REFERENCE = 0.005
REPAIRS = ("repair", "rival")
KEY = ["kind", "base", "method"]  # what a row of the table is, over its seeds
COSTS = ["extra_parameters", "bytes", "passes", "labels", "needs_task"]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: the folder.
        tasks: in the pool's order.
        models: every model by name.
        reports: model -> task -> ``accuracy``, a share of test images, and whatever else its task
            pool reports; empty if none evaluated.
        command, config: the command line, and the composed configuration as YAML, if Hydra's files
            are there.
        analysis: merge -> analysis -> task -> encoder -> value.
        problems: what did not run -> why, in a line.
        answers: the class of every test image by model, if the run kept them.
    """

    folder: Path
    tasks: list[str]
    models: dict[str, results.Result]
    reports: dict[str, Json] = field(default_factory=dict)
    command: str | None = None
    config: str | None = None
    analysis: dict[str, Json] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    answers: Answers | None = None

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.folder.resolve().name

    def table(self) -> pd.DataFrame:
        """One line per model: what it is, its costs and accuracies; ``label`` is for people."""
        facts, lines = ["kind", "seed", "transductive", "seconds", "losses", *COSTS], []
        for name, model in self.models.items():
            shown = model.method or model.base or model.kind
            line = {fact: getattr(model, fact) for fact in facts} | {
                "name": name,
                "base": model.base or "",
                "method": model.method or "",
                "label": formatting.method(shown, model.rank, model.budget),
                "size": 0 if model.extra_parameters == 0 else model.budget or model.rank or 1,
                "images": "; ".join(images.in_words(seed=False) for images in model.images),
            }
            report = self.reports.get(name, {})
            lines.append(line | {t: report[t]["accuracy"] for t in self.tasks if t in report})
        return pd.DataFrame(lines)


@dataclass(frozen=True, eq=False)
class Row:
    """A model over its seeds: a group of lines of ``Evaluation.models``.

    Attributes:
        models: its (run, name) by seed: place in ``Evaluation.runs``, and the name there.
        costs: those of ``COSTS`` that are known.
        values: one line per seed: accuracies by task, ``average``, ``gap_closed``, ``of_experts``
            and ``seconds``.
        mean, std: over these lines; the sample deviation (n - 1), NaN of one seed.
    """

    kind: str
    base: str
    method: str
    label: str
    images: str
    transductive: bool | None
    models: list[tuple[int, str]]
    costs: Json
    seeds: list[int]
    values: pd.DataFrame
    mean: pd.Series
    std: pd.Series

    @property
    def extra_parameters(self) -> int | None:
        """Over all tasks."""
        return self.costs.get("extra_parameters")


@dataclass(frozen=True)
class Evaluation:
    """The models of one run or more, on the same tasks.

    Attributes:
        tasks: in the pool's order.
        models: one line per model: ``Run.table`` with the number of its ``run``, the ``average``
            over tasks, ``gap_closed``, (average - merge) / (experts - merge), and, beside rivals,
            ``of_experts``, the mean over tasks of accuracy / expert's, if they are known.
            ``method`` carries ``@folder`` if runs gave one name to different things.
        runs: the runs they came from.
    """

    tasks: list[str]
    models: pd.DataFrame
    runs: list[Run]

    @cached_property
    def bases(self) -> list[str]:
        """The merges, in the order of the runs."""
        return [base for base in self.models["base"].unique() if base] if len(self.models) else []

    @cached_property
    def rows(self) -> list[Row]:
        """Pretrained, each merge with its repairs, the experts."""
        if self.models.empty:
            return []
        rows = []
        for (kind, base, method), lines in self.models.groupby(KEY, sort=False):
            lines = lines.sort_values("seed")
            first = lines.iloc[0]
            costs = {cost: first[cost] for cost in COSTS if not pd.isna(first[cost])}
            split = None if pd.isna(first["transductive"]) else bool(first["transductive"])
            seeds = lines["seed"].dropna().astype(int).tolist()
            numbers = [*self.tasks, "average", "gap_closed", "of_experts", "seconds"]
            values = lines[numbers].astype(float).reset_index(drop=True)
            models = list(zip(lines["run"], lines["name"], strict=True))
            about = kind, base, method, first["label"], first["images"], split, models, costs, seeds
            rows.append(Row(*about, values, values.mean(), values.std()))
        kinds, bases = ["pretrained", "merge", *REPAIRS, "experts"], [*self.bases, ""]
        bounds = {"pretrained": -1, "experts": len(bases)}
        place = {r: (bounds.get(r.kind, bases.index(r.base)), kinds.index(r.kind)) for r in rows}
        return sorted(rows, key=place.__getitem__)

    @property
    def methods(self) -> list[tuple[str, str, float]]:
        """Name, label and size of every repair, those that were not evaluated too."""
        table = pd.concat([self.models, *(run.table() for run in self.runs)])
        if table.empty:
            return []
        table = table[table["method"] != ""].drop_duplicates("method")
        return list(table[["method", "label", "size"]].itertuples(index=False, name=None))

    @property
    def repairs(self) -> list[Row]:
        """The rows of repairs and rivals."""
        return [row for row in self.rows if row.kind in REPAIRS]

    def references(self, base: str) -> list[Row]:
        """The rows of a merge and the experts, if there are any."""
        return [r for r in self.rows if r.kind == "experts" or (r.kind, r.base) == ("merge", base)]


def read_run(folder: str | Path) -> Run:
    """Read a run folder: a report, or an ``analysis.json`` if no task pool evaluated.

    Raises:
        ConfigError: no such folder, no report, broken JSON, or another layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(str(folder), "no such folder", _EXPECTED)
    analysed = read_json(folder / ANALYSIS)
    report, details = read_json(folder / REPORT), read_json(folder / results.FILE)
    if report is None and analysed is None:
        problem = f"has no {REPORT}; the run is not finished, or this is no run"
        raise ConfigError(str(folder), problem, _EXPECTED)
    if details is None and report is not None:
        raise ConfigError(str(folder), f"has no {results.FILE} beside its {REPORT}", _EXPECTED)
    if details is None:
        own = results.Results(tasks=list(map(str, (analysed or {}).get("tasks", []))), models={})
    else:
        own = results.parse_results(details, str(folder / results.FILE))
    try:
        # a run of one model reports it alone, others by name
        alone = report is not None and "average" in report
        reports = {} if report is None else {n: report if alone else report[n] for n in own.models}
        if alone:  # what it is compared with has a file of its own
            references = read_json(folder / results.REFERENCES) or {}
            known = {
                name: results.Result(kind="pretrained")
                if name == "pretrained"
                else results.Result(kind="merge", base=name, extra_parameters=0)
                for name in references
            }
            own = own.model_copy(update={"models": known | own.models})
            reports = references | reports
        tasks = [t for t in own.tasks if not reports or any(t in one for one in reports.values())]
        if own.tasks and not tasks:
            raise ValueError("none of the run's tasks was evaluated")
        lacking = {task: "the task pool lacks it" for task in own.tasks if task not in tasks}
        for name, task in ((name, task) for name in reports for task in tasks):
            share = reports[name][task]["accuracy"]
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"{name}: the accuracy of {task} is {share!r}, which is no share")
    except (KeyError, TypeError, ValueError) as error:
        raise wrong_layout(folder / REPORT, error) from None
    analysis = (analysed or {}).get("merges", {})
    about = reports, *_hydra(folder), analysis, own.problems | lacking, read_answers(folder)
    return Run(folder, tasks, own.models, *about)


def gather(runs: Sequence[Run], bases: Sequence[str] = ()) -> Evaluation:
    """Put the runs' models together: seeds of one method meet, references are kept once.

    ``bases`` are the merges to keep; all if empty.

    Raises:
        ConfigError: the runs are of different tasks or pools, or a base is in none of them.
    """
    tasks = runs[0].tasks
    for run in runs:
        if set(run.tasks) != set(tasks):
            problem = f"its tasks are not those of {runs[0].folder}"
            raise ConfigError(str(run.folder), problem, "runs on the same tasks")
    tables = [run.table().assign(run=i) for i, run in enumerate(runs) if run.reports]
    models = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    evaluation = Evaluation(tasks, models, list(runs))
    for base in bases:
        if base not in evaluation.bases:
            raise ConfigError("--base", f"no run has {base!r}", ", ".join(evaluation.bases))
    if models.empty:
        return evaluation
    if bases:
        models = models[models["base"].isin(["", *bases])]
    models["average"] = models[tasks].mean(axis=1)
    repairs = models["kind"].isin(REPAIRS)
    models = pd.concat([_references(models[~repairs], runs), _apart(models[repairs], tasks, runs)])
    models = models.sort_index()
    merges = models[models["kind"] == "merge"].set_index("base")["average"]
    merge = models["base"].map(merges).where(models["kind"].isin(REPAIRS))
    experts = models[models["kind"] == "experts"]
    way = experts["average"].max() - merge
    models["gap_closed"] = ((models["average"] - merge) / way).where(way > 0)
    beside_rivals = len(experts) and (models["kind"] == "rival").any()
    shares = models[tasks] / experts[tasks].iloc[0] if beside_rivals else models[[]]
    models["of_experts"] = shares.mean(axis=1)
    return replace(evaluation, models=models)


def _references(models: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Merges, experts and the pretrained encoder, each once."""
    models = models.assign(first=models.groupby(["kind", "base"])["average"].transform("first"))
    for line in models[(models["average"] - models["first"]).abs() > _SAME_REFERENCE].itertuples():
        problem = f"{line.base or line.kind} has an average accuracy of {line.average:.1%} there"
        problem += f", and of {line.first:.1%} in another run"
        raise ConfigError(str(runs[line.run].folder), problem, "runs on the same pool")
    return models.drop_duplicates(["kind", "base"])


def _apart(models: pd.DataFrame, tasks: Sequence[str], runs: Sequence[Run]) -> pd.DataFrame:
    """Repairs; those that share a name with another run's, but not its settings, by folder."""
    settings = map(str, models[[*COSTS, "images", "transductive"]].to_numpy().tolist())
    models = models.assign(setting=list(settings))
    models = models.drop_duplicates([*KEY, "seed", "setting", *tasks])
    names = [run.name for run in runs]
    for _, lines in models.groupby(KEY):
        other = (lines["setting"] != lines["setting"].iloc[0]) | lines.duplicated("seed")
        for run in lines.loc[other, "run"].unique():
            name = names[run] + (f"-{run + 1}" if names.count(names[run]) > 1 else "")
            own = lines.index[lines["run"] == run]
            models.loc[own, "method"] += f"@{name}"
            models.loc[own, "label"] += f" ({name})"
    return models


def read_json(path: Path) -> Json | None:
    """The mapping that a JSON file holds; None if there is no file.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", _EXPECTED) from None


def wrong_layout(path: Path, error: Exception, layout: str = _EXPECTED) -> ConfigError:
    """The error of a file in which something is missing or wrong."""
    reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
    return ConfigError(str(path), f"is not laid out as expected ({reason})", layout)


def _hydra(folder: Path) -> tuple[str | None, str | None]:
    """The command line and the configuration, wherever Hydra put them."""
    places = [folder / place for place in (".", ".hydra", "hydra_output", "hydra_output/.hydra")]
    place = next((p for p in places if (p / "overrides.yaml").is_file()), folder)
    command = config = None
    # These files only add to a report: without them it is poorer, not wrong.
    with suppress(Exception):
        overrides = list(map(str, OmegaConf.load(place / "overrides.yaml")))
        command = shlex.join(["fusion_bench", *overrides])
        name = OmegaConf.select(OmegaConf.load(place / "hydra.yaml"), "hydra.job.config_name")
        if name not in (None, "fabric_model_fusion"):
            command = shlex.join(["fusion_bench", "--config-name", name, *overrides])
    with suppress(Exception):
        config = (place / "config.yaml").read_text("utf-8")
    return command, config
