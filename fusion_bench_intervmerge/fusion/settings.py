"""Settings of a merge and its repair, as ``method.KEY`` sets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from ..config import ConfigError, Flag, Folder, Settings
from ..distillation.settings import DistillSettings
from ..interventions.config import Interventions
from ..merging import CoefficientSettings
from ..model.artifact import Storage
from ..model.router import RouterSettings
from ..solving.recalibrate import check_sites
from ..solving.solve import SolveSettings

OPTIONAL_FOLDER = Field(description="null, or the path of a folder")


class MergeSettings(Settings):
    """What is merged, and where it is edited.

    Args:
        interventions: site -> edit settings (``InterventionConfig``).
        base: config of the FusionBench method that merges the experts, any of them:
            ``method@method.base=ties_merging``; a ``_merged_`` model in the pool wins over it, and
            ``coefficients`` over both.
        coefficients: merge by task vectors with these coefficients instead
            (``CoefficientSettings``).
    """

    interventions: Interventions
    base: object = None
    coefficients: CoefficientSettings | None = None


class MethodSettings(DistillSettings, SolveSettings, MergeSettings):
    """The settings of ``method=intervmerge``, ``surgery`` and ``surgery_v2``.

    Args:
        storage: type of the saved edits: ``float32``, ``float16``, or ``int8`` with a scale per
            row. They are rounded before they are evaluated.
        recalibrate: with ``base: calibration``, solve its maps once more, together with the edits
            of each block; for edits at block outputs alone, in closed form.
        router: names an image's task if nobody does; fitted on the same images. A name, or
            ``RouterSettings``.
        references: evaluate the merge, and the pretrained encoder if it is at hand, beside the
            repaired model; in the task pools of this package.
        save_to: folder for the artifact; ``{log_dir}`` stands for the run's log folder.
        resume: ``auto`` continues a run of the same settings that was stopped, and takes from the
            cache folder the coefficients that an earlier run of AdaMerging found on the pool and
            the experts' features of the same images (2 GiB at most are kept); ``never`` does not.
        extend: folder of a saved model, to which the pool's new tasks are added; nothing is merged
            and its own ``interventions`` hold.

    Raises:
        ConfigError: the first setting that does not fit.
    """

    storage: Storage = "float32"
    recalibrate: Flag = False
    router: Annotated[
        RouterSettings | None,
        BeforeValidator(lambda value: None if value is None else RouterSettings.read(value)),
    ] = None
    references: Flag = True
    save_to: Annotated[Folder | None, OPTIONAL_FOLDER] = None
    resume: Literal["auto", "never"] = "auto"
    extend: Annotated[Folder | None, OPTIONAL_FOLDER] = None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        inits = {config.init for config in self.interventions.values()}
        if self.budget is not None and "regression" not in inits:
            raise ConfigError(
                "budget",
                "only edits in closed form have one",
                "null, or a site with init: regression",
            )
        if self.recalibrate and self.extend is None:
            check_sites(self.interventions)
            if "regression" not in inits:
                problem, allowed = "its edits are not in closed form", "false, or init: regression"
                raise ConfigError("recalibrate", problem, allowed)
        if self.save_to is not None:
            try:
                self.save_to.format(log_dir="")
            except (LookupError, ValueError):
                allowed = "a folder; {log_dir} stands for the run's log folder"
                raise ConfigError("save_to", repr(self.save_to), allowed) from None
        check_method(self.base, "base")
        return self


def check_method(config: object, where: str) -> None:
    """Raise ConfigError unless it is null, a method object, or a config that names a method."""
    named = isinstance(config, Mapping) and any(
        isinstance(config.get(key), str) and config[key] for key in ("_target_", "name")
    )
    if not (named or config is None or hasattr(config, "run")):
        raise ConfigError(
            where, "names no method", f"method@method.{where}=task_arithmetic, or another"
        )
