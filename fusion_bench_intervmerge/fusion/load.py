"""``fusion_bench method=intervmerge/load``: evaluate a saved model later."""

from __future__ import annotations

from typing import Annotated, Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from pydantic import Field

from ..errors import unknown_key
from ..model import InterventionModel
from ..settings import Flag, Folder, Settings
from .host import HostedInterventionModel
from .program import check_task_pool, split_settings
from .screen import host_in_the_log, one_line


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


class LoadInterventionModel(BaseAlgorithm):
    """Read an artifact instead of training.

    Args:
        path: the artifact's folder.
        settings: the other ones of ``LoadSettings``.
    """

    Settings = LoadSettings

    @one_line
    def __init__(self, path: Any = None, **settings: Any):
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
        model = HostedInterventionModel.from_pretrained(self.settings.path)
        check_task_pool(self._program, model.tower.family)
        for task in self.settings.drop:
            if task not in model.tasks:
                raise unknown_key(task, model.tasks, "task").under("drop")
            model.drop_task(task)
        return model.fold() if self.settings.fold else model
