"""Saved models: ``fusion_bench method=intervmerge/load`` and ``method=intervmerge/analyse``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fusion_bench import BaseModelPool
from pydantic import Field, model_validator
from rich.console import Console
from typing_extensions import Self

from ..analysis import ANALYSES, MERGED, read_analyses
from ..config import ConfigError, Flag, Folder, Json, Settings, unknown_key, whole
from ..model.artifact import Artifact
from ..model.model import InterventionModel
from ..results import Result
from .host import Method, check_task_pool, has_task_pool, host_in_the_log, name_models, one_line
from .hosted import HostedInterventionModel
from .pools import ExpertPool, prepare_task_pool
from .records import Analyser, diagnosis_table, saved_result


class LoadSettings(Settings):
    """The settings of ``method=intervmerge/load``.

    Args:
        path: the artifact's folder.
        drop: tasks to leave out.
        fold: whether to bring the edits into the form that needs least at inference.
    """

    path: Folder
    drop: Annotated[list[str], Field(description="a list of tasks")] = Field(default=[])
    fold: Flag = False


class LoadInterventionModel(Method):
    """Read an artifact instead of training."""

    Settings = LoadSettings

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> InterventionModel:
        """The saved model; the model pool is not read.

        Raises:
            ArtifactError: what does not fit, in one line.
            ConfigError: a task to leave out that the model does not have.
        """
        folder = Path(self.settings.path).resolve()
        model = HostedInterventionModel.from_pretrained(self.settings.path)
        for task in self.settings.drop:
            if task not in model.tasks:
                raise unknown_key(task, model.tasks, "task").under("drop")
            model.drop_task(task)
        check_task_pool(self._program, model.tower.family, model.tasks)
        prepare_task_pool(self._program)
        if self.settings.fold:
            model = model.fold()
        if self._program is not None:
            base, name = (model.metadata.get(key) for key in ("base", "name"))
            result = saved_result(model, base or "merged", name or folder.name)
            self.write(model.tasks, {folder.name: result})
            name_models(self._program, {folder.name: model})
        return model


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


class AnalyseInterventionModel(Method):
    """Analyse a saved model against the pool's experts."""

    Settings = AnalyseSettings

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
        prepare_task_pool(self._program)
        tasks = [task for task in pool.tasks if task in model.tasks]
        if not tasks:
            allowed = ", ".join(model.tasks)
            raise ConfigError("modelpool.models", "no expert is of the model's tasks", allowed)
        name = folder.resolve().name
        # without a task the model is the merged encoder
        merge = Result(kind="merge", base=MERGED, extra_parameters=0)
        self.write(tasks, {MERGED: merge, name: saved_result(model, MERGED, name)})
        if self.fabric.is_global_zero:
            values = analyser.run(MERGED, pool, model.tower, {name: model}, tasks)
            analyser.write(Path(self.log_dir or "."), tasks)
            if "bias" in values:
                Console().print(diagnosis_table(_rows(values, name)))
        if not has_task_pool(self._program):
            return None
        # a tower of its own, because the model's carries the hooks of the edits
        merged = Artifact.read(folder).tower.library_model()
        models: dict[str, object] = {MERGED: merged, name: model}
        name_models(self._program, models, [MERGED])
        return models


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
