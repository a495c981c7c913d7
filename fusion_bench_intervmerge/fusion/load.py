"""``fusion_bench method=intervmerge/load``: evaluate a saved model later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_bench import BaseAlgorithm, BaseModelPool

from ..errors import ConfigError
from ..model import InterventionModel


class LoadInterventionModel(BaseAlgorithm):
    """Read an artifact instead of training.

    Args:
        path: the artifact's folder.
        drop: tasks to leave out.
        fold: whether to bring the edits into the form that needs least at inference.
    """

    def __init__(self, path: str, drop: Sequence[str] = (), fold: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if not isinstance(path, str):
            raise ConfigError("path", f"{path!r}", "the folder of a saved model")
        self.path, self.drop, self.fold = path, list(drop), fold

    def run(self, modelpool: BaseModelPool) -> InterventionModel:
        """The saved model; the model pool is not read.

        Raises:
            ArtifactError: what does not fit, in one line.
        """
        model = InterventionModel.from_pretrained(self.path)
        for task in self.drop:
            model.drop_task(task)
        return model.fold() if self.fold else model
