"""Analyses against a pool's experts: a comparison's, and ``method=intervmerge/analyse``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from pydantic import model_validator
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import Self

from ..analysis import ANALYSES, MERGED, analyse, read_analyses
from ..analysis.base import TaskEncoders
from ..config import ConfigError, Folder, Json, Settings, whole
from ..encoders.base import VisionTower
from ..files import write_json
from ..model.artifact import Artifact
from ..model.model import InterventionModel
from ..results import Result, Results
from .host import check_task_pool, has_task_pool, host_in_the_log, one_line, split_settings
from .hosted import HostedInterventionModel
from .pools import ExpertPool
from .records import diagnosis_table, saved_result


class Analyser:
    """Runs analyses and writes their values to ``analysis.json``.

    The file holds ``images`` (per task), ``split``, ``tasks``, and ``merges``: merge -> analysis ->
    task -> encoder -> value; the encoders are ``merged``, the repaired models by name, and for
    embeddings ``expert``.

    Args:
        analyses: names, ``all``, or null for none.
        images: images per task, the same for every encoder.
        split: the split that they are taken from.
        device: where the encoders run.

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
        """Analyse one merge and its repairs, one task and so one expert at a time.

        Args:
            name: the name of the merge.
            pool: the experts, their images and heads.
            merged: the merged encoder.
            models: name -> repaired model.
            tasks: those to look at.

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


class AnalyseSettings(Settings):
    """The settings of ``method=intervmerge/analyse``.

    Args:
        path: the artifact's folder.
        analyses: names of analyses, or ``all``.
        images: images per task.
        split: the split they are of: ``test``, ``validation`` or ``train``.
    """

    path: Folder
    analyses: Any = "all"
    images: Annotated[int, whole(1, 10**9)] = 256
    split: Literal["test", "validation", "train"] = "test"

    @model_validator(mode="after")
    def _analyses_exist(self) -> Self:
        if not read_analyses(self.analyses):
            raise ConfigError("analyses", "there is none", f"all, or some of {', '.join(ANALYSES)}")
        return self


class AnalyseInterventionModel(LightningFabricMixin, BaseAlgorithm):
    """Analyse a saved model against the pool's experts.

    Args:
        path: the artifact's folder.
        settings: the other ones of ``AnalyseSettings``.
    """

    Settings = AnalyseSettings

    @one_line
    def __init__(self, path: object = None, **settings: object):
        settings, host = split_settings(settings, path=path)
        super().__init__(**host)
        self.settings = AnalyseSettings.read(settings)

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> dict[str, object] | None:
        """Analyse, and hand the merged encoder and the repaired model to the task pool, if any.

        Raises:
            ArtifactError: what does not fit in the folder, in one line.
            ConfigError: a setting or a pool that does not fit, in one line.
        """
        settings = self.settings
        pool, folder = ExpertPool(modelpool), Path(settings.path)
        analyser = Analyser(settings.analyses, settings.images, settings.split, self.fabric.device)
        model = HostedInterventionModel.from_pretrained(folder)
        check_task_pool(self._program, pool.family, model.tasks)
        tasks = [task for task in pool.tasks if task in model.tasks]
        if not tasks:
            allowed = ", ".join(model.tasks)
            raise ConfigError("modelpool.models", "no expert is of the model's tasks", allowed)
        name = folder.resolve().name
        merge = Result(kind="merge", base=MERGED, extra_parameters=0)
        results = Results(
            tasks=tasks, models={MERGED: merge, name: saved_result(model, MERGED, name)}
        )
        if self.fabric.is_global_zero:
            # without a task the model is the merged encoder
            results.write(self.log_dir)
            values = analyser.run(MERGED, pool, model.tower, {name: model}, tasks)
            analyser.write(Path(self.log_dir or "."), tasks)
            if "bias" in values:
                Console().print(diagnosis_table(_rows(values, name)))
        if not has_task_pool(self._program):
            return None
        # a tower of its own, because the model's carries the hooks of the edits
        merged = Artifact.read(folder).tower.library_model()
        return {MERGED: merged, name: model}


def _rows(values: Mapping[str, Json], name: str) -> dict[str, dict[str, float]]:
    """Task -> the numbers of a diagnosis, before and after the repair."""
    encoders = {"before": MERGED, "after": name}
    rows: dict[str, dict[str, float]] = {}
    for task, bias in values["bias"].items():
        shares = values.get("agreement", {}).get(task)
        rows[task] = {f"bias_{when}": bias[of]["features"] for when, of in encoders.items()}
        if shares:
            rows[task] |= {f"agreement_{when}": shares[of] for when, of in encoders.items()}
    return rows
