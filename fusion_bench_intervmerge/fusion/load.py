"""``fusion_bench method=intervmerge/load``: evaluate a saved model later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import LightningFabricMixin
from pydantic import Field

from ..config import Flag, Folder, Settings, unknown_key
from ..model.model import InterventionModel
from ..results import Results
from .host import check_task_pool, host_in_the_log, one_line, split_settings
from .hosted import HostedInterventionModel
from .records import saved_result


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


class LoadInterventionModel(LightningFabricMixin, BaseAlgorithm):
    """Read an artifact instead of training.

    Args:
        path: the artifact's folder.
        settings: the other ones of ``LoadSettings``.
    """

    Settings = LoadSettings

    @one_line
    def __init__(self, path: object = None, **settings: object):
        settings, host = split_settings(settings, path=path)
        super().__init__(**host)
        self.settings = LoadSettings.read(settings)

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
        if self.settings.fold:
            model = model.fold()
        if self._program is not None and self.fabric.is_global_zero:
            base, name = (model.metadata.get(key) for key in ("base", "name"))
            result = saved_result(model, base or "merged", name or folder.name)
            Results(tasks=model.tasks, models={folder.name: result}).write(self.log_dir)
        return model
