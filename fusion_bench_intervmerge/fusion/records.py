"""What the methods write of their models: results, analyses, and lines on the screen."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..analysis import analyse, read_analyses
from ..analysis.base import TaskEncoders
from ..config import ConfigError, Json
from ..encoders.base import VisionTower
from ..files import write_json
from ..model.model import InterventionModel
from ..report import tables
from ..report.runs import Evaluation, gather, read_run
from ..results import ImagesUsed, Result
from .pools import ExpertPool

# -- results ---------------------------------------------------------------------------------------


def repair_result(
    model: InterventionModel, settings: Json, images: list[ImagesUsed], **more: object
) -> Result:
    """The result of a repaired model, with its method's settings and the images it was found on."""
    extra, budget = model.extra_parameters(), settings.get("budget")
    edits = [model.edits_of(task) for task in model.tasks]
    ranks = {r for own in edits for at in own.ranks().values() for r in at.values()}
    known: Json = {
        "budget": budget,
        "rank": ranks.pop() if budget is None and len(ranks) == 1 else None,
        "settings": dict(settings),
        "extra_parameters": extra["total"],
        "extra_parameters_folded": extra["folded"],
        "extra_parameters_by_task": extra["per_task"],
        "bytes": extra["bytes"] + 4 * extra.get("router", 0),
        "labels": 0,
        "passes": 1.0,
        "needs_task": model.router is None,
        "images": images,
    }
    return Result(kind="repair", **known | more)


def saved_result(model: InterventionModel, base: str, method: str) -> Result:
    """The result of a saved model, as far as it tells; its merge and repair are called so."""
    settings, images = model.metadata.get("method") or {}, saved_images(model)
    return repair_result(model, settings, images, seed=model.seed, base=base, method=method)


def saved_images(model: InterventionModel) -> list[ImagesUsed]:
    """The images that a saved model's edits were found on, as far as it tells."""
    known = model.metadata.get("images")
    # a sentence stands for images that are not known, of a model that was made in Python
    images = known if isinstance(known, list) else []
    return [ImagesUsed.read(one, "images") for one in images if not isinstance(one, str)]


def method_name(result: Result) -> str:
    """The method's name on the command line, with its size: ``intervmerge_r4``."""
    name = hydra_choices().get("method", "intervmerge").replace("/", "_")
    if result.budget is not None:
        return f"{name}_b{result.budget}"
    return name if result.rank is None else f"{name}_r{result.rank}"


def base_name(base: object, where: str = "method.base") -> str:
    """A base method's name on the command line, at its key; in Python, the name of its class."""
    if chosen := hydra_choices().get(f"method@{where}"):
        return chosen.replace("/", "_")
    named = base.get("_target_") or base.get("name") if isinstance(base, Mapping) else None
    return str(named or type(base).__name__).rpartition(".")[2]


def fitting_task_pool(tasks: Sequence[str], pretrained: object) -> str:
    """The name of a task pool that evaluates a model pool's models.

    Args:
        tasks: the model pool's.
        pretrained: its config of the pretrained model, which tells the architecture.

    Returns:
        ``...`` if none is known.
    """
    chosen = hydra_choices().get("modelpool", "/")
    if "/" not in chosen:
        return chosen  # each of this package's pools has a task pool of its name
    sizes = {"base-patch32": "b32", "base-patch16": "b16", "large-patch14": "l14"}
    sizes |= {"ViT-B-32": "b32", "ViT-B-16": "b16", "ViT-L-14": "l14"}
    size = next((short for name, short in sizes.items() if name in f"{pretrained} {chosen}"), None)
    if size is None:
        return "..."
    family = "openclip" if "OpenCLIP" in chosen else "clip"
    many = 8 if family == "openclip" or len(tasks) <= 8 else 14 if len(tasks) <= 14 else 20
    return f"{family}-vit-{size}_{'TA8' if many == 8 else f'TALL{many}'}"


def hydra_choices() -> dict[str, str]:
    """Which config of each group was chosen; empty if Hydra composed none."""
    if not HydraConfig.initialized():
        return {}
    return {key: str(name) for key, name in HydraConfig.get().runtime.choices.items() if name}


# -- analyses --------------------------------------------------------------------------------------


class Analyser:
    """Runs analyses on some images per task of a split, and writes ``analysis.json``.

    The file holds ``images``, ``split``, ``tasks``, and ``merges``: merge -> analysis -> task ->
    encoder -> value; the encoders are ``merged``, the repaired models by name, and for embeddings
    ``expert``.

    Raises:
        ConfigError: an analysis that does not exist.
    """

    def __init__(
        self, analyses: str | Sequence[str] | None, images: int, split: str, device: torch.device
    ):
        self.names = read_analyses(analyses)
        self.images, self.split, self.device = images, split, device
        self.merges: dict[str, Json] = {}

    def run(
        self,
        name: str,
        pool: ExpertPool,
        merged: VisionTower,
        models: Mapping[str, InterventionModel],
        tasks: Sequence[str],
    ) -> Json:
        """Analyse a merge and its repairs by name, with one expert in memory at a time.

        Returns:
            Analysis -> task -> encoder -> value.
        """
        values: dict[str, Json] = {}
        encoders: list[VisionTower | InterventionModel] = [merged, *models.values()]
        before = {encoder: encoder.device for encoder in encoders}
        for encoder in before:
            encoder.to(self.device)
        for task in tasks:
            images, labels = self._images(pool, task)
            expert = pool.tower(task).requires_grad_(False).eval().to(self.device)
            encoded = TaskEncoders(task, images, expert, merged, models, pool.head(task), labels)
            for analysis, own in analyse(encoded, self.names).items():
                values.setdefault(analysis, {})[task] = own
        for encoder, device in before.items():
            encoder.to(device)
        self.merges[name] = values
        return values

    def write(self, folder: Path, tasks: Sequence[str]) -> None:
        """Write ``analysis.json`` beside the report."""
        about = {"images": self.images, "split": self.split, "tasks": list(tasks)}
        write_json(folder / "analysis.json", {**about, "merges": self.merges}, indent=None)

    def _images(self, pool: ExpertPool, task: str) -> tuple[Tensor, Tensor | None]:
        """Images drawn with a fixed seed, since some data sets are sorted by class."""
        dataset = pool.images(task, self.split)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        chosen = sorted(order[: self.images].tolist())
        batches = list(DataLoader(Subset(dataset, chosen), batch_size=64))
        labels = torch.cat([torch.as_tensor(batch[1]) for batch in batches])
        # -1 stands for a label that is not given
        return torch.cat([batch[0] for batch in batches]), labels if labels.min() >= 0 else None


# -- diagnosis -------------------------------------------------------------------------------------

ENCODERS = {"before": "merged", "after": "repaired"}


@torch.no_grad()
def diagnose(
    model: InterventionModel,
    task: str,
    dataset: Dataset[Any],
    indices: list[int],
    expert: Tensor,
    head: Callable[[Tensor], Tensor] | None,
) -> dict[str, float]:
    """One task's representation bias, and its agreement with the expert's predictions.

    Args:
        model, task: the repaired model, and its task.
        dataset, indices: items (pixel values, ...), and which of them to look at.
        expert: the expert's image features of these images, (images, projection_dim).
        head: zero-shot logits of image features; without one, agreement is left out.

    Returns:
        ``bias_before`` and ``bias_after``, the mean L1 of image features to the expert's, and with
        a head ``agreement_before`` and ``agreement_after``, the share of images on which the
        predicted class is the expert's.
    """
    features: dict[str, list[Tensor]] = {when: [] for when in ENCODERS}
    for batch in DataLoader(Subset(dataset, indices), batch_size=64):
        images = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(model.device)
        features["before"].append(model.encode(images).float().cpu())
        features["after"].append(model.encode(images, task).float().cpu())
    row = {}
    for when, parts in features.items():
        own = torch.cat(parts)
        row[f"bias_{when}"] = float((own - expert).abs().mean())
        if head is not None:
            same = head(own).argmax(dim=-1) == head(expert).argmax(dim=-1)
            row[f"agreement_{when}"] = float(same.float().mean())
    return row


def diagnosis_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """The tasks' diagnosis as a table for the terminal."""
    numbers = pd.DataFrame.from_dict(rows, orient="index")
    numbers.loc["average"] = numbers.mean()
    shown = pd.DataFrame({"task": numbers.index})
    for name in numbers:
        what, _, when = str(name).partition("_")
        form = "{:.4f}" if what == "bias" else "{:.1%}"
        cells = ["-" if isnan(number) else form.format(number) for number in numbers[name]]
        shown[f"{what}, {ENCODERS[when]}"] = cells
    return tables.rich(shown, [len(rows) - 1])


# -- the screen ------------------------------------------------------------------------------------


def announce(*lines: str) -> None:
    """Print what is going to be done, one statement per line."""
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line)


def summarize_at_exit(folder: str | Path | None) -> None:
    """Print ``summary`` once FusionBench has printed its own report, at the end of the process.

    Not for the jobs of a sweep, which has a summary of its own, and not outside of a Hydra run.
    """
    hydra = HydraConfig.initialized() and HydraConfig.get().mode != RunMode.MULTIRUN
    if folder is not None and hydra:
        atexit.register(summary, Path(folder))


def summary(folder: Path) -> None:
    """Print a run's accuracies, which images it saw, where its files are, and what is next."""
    try:
        evaluation = gather([read_run(folder)])
    except ConfigError:
        return  # the run did not get that far, and has said why
    if not evaluation.rows:
        return
    console = Console(highlight=False)
    few = len(evaluation.rows) <= 4  # tasks down, which fits into any terminal
    console.print(by_task(evaluation) if few else tables.to_terminal(evaluation, console))
    for row in evaluation.repairs if few else ():
        numbers = int(row.extra_parameters or 0)
        console.print(f"{row.label}: {numbers:,} extra parameters over all tasks")
    splits = {row.transductive for row in evaluation.repairs}
    if True in splits:
        console.print("Transductive: found on unlabelled images of the very split it is tested on.")
        console.print("For a held-out result: method.data.split=train")
    elif splits == {False}:
        console.print("Held-out: none of the images it was found on is tested.")
    plain = Console(soft_wrap=True, highlight=False)
    plain.print(f"Results: {folder}; a page with figures: intervmerge report {folder}")
    saved = [path.parent.name for path in folder.glob("*/interventions")]
    if saved:
        plain.print(f"Model: {folder / saved[0]}; for elsewhere: intervmerge export")
    elif evaluation.repairs and not (folder / "models").is_dir():  # a comparison keeps none
        weights = evaluation.repairs[0].costs.get("needs_task") is False  # and no edits
        where = "merged_model_save_path='{log_dir}/model'"
        where = where if weights else "method.save_to='{log_dir}/intervmerge'"
        plain.print(f'To keep the model: "{where}"', markup=False)


def by_task(evaluation: Evaluation) -> Table:
    """Accuracy in percent, one line per task and one column per model."""
    names = [*evaluation.tasks, "average"]
    shown = tables.cells(evaluation)[names].map(lambda cell: cell.text).T
    shown.columns = pd.Index([fill(tables.label(row), 15) for row in evaluation.rows])
    shown.insert(0, "accuracy, %", names)
    return tables.rich(shown, [len(names) - 2])
