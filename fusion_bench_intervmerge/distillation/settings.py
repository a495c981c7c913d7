"""Settings of a training, and of a whole repair as ``method.KEY`` writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from ..errors import ConfigError
from ..images import RepairSettings
from ..interventions import read_interventions
from ..merging import CoefficientSettings
from ..routing import RouterSettings
from ..routing.settings import read_settings
from ..settings import Flag, Folder, Settings, nested, whole
from ..solving.settings import SolveSettings
from ..storage import Storage
from .optimizer import OPTIMIZER

OPTIONAL_FOLDER = Field(description="null, or the path of a folder")


class DistillSettings(RepairSettings):
    """What ``distill`` takes.

    Args:
        steps: steps a task; each shows every task one batch of its images. 0: no training.
        loss: ``output``, the mean L1 of the image features, or ``blocks``, which adds that of every
            block's token mean (SurgeryV2).
        optimizer: config of any torch optimizer (in Python also a function of the parameters). The
            published optimizer lists every parameter three times, so that each of its steps at 1e-3
            is three steps of Adam; hence 3e-3.
        save_every: steps between two states of a run that may be stopped.
        compile: compile the encoder's blocks for the training; it takes about half a minute, and
            pays in long runs of wide encoders.
    """

    steps: Annotated[int, whole(0, 10**7)] = 1000
    loss: Literal["output", "blocks"] = "output"
    optimizer: Annotated[
        dict[str, Any] | Callable[..., Any], Field(description=f"a mapping like {OPTIMIZER}")
    ] = Field(default=OPTIMIZER)
    save_every: Annotated[int, whole(1, 10**7)] = 100
    compile: Flag = False


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

    interventions: Any
    base: Any = None
    coefficients: Annotated[CoefficientSettings, nested(CoefficientSettings)] | None = None


class MethodSettings(DistillSettings, SolveSettings, MergeSettings):
    """The settings of ``method=intervmerge``, ``surgery`` and ``surgery_v2``.

    Args:
        storage: of the edits: ``float32``, ``float16``, or ``int8`` with a scale a row. They are
            rounded once they are found, so that what is evaluated is what is saved.
        router: what tells an image's task where nobody does, fitted on the same images: a name, or
            ``RouterSettings``.
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
    router: Annotated[
        RouterSettings | None,
        BeforeValidator(lambda value: None if value is None else read_settings(value)),
    ] = None
    save_to: Annotated[Folder | None, OPTIONAL_FOLDER] = None
    resume: Literal["auto", "never"] = "auto"
    extend: Annotated[Folder | None, OPTIONAL_FOLDER] = None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        sites = read_interventions(self.interventions)
        if self.budget is not None and all(c.init != "regression" for c in sites.values()):
            raise ConfigError(
                "budget",
                "only edits in closed form have one",
                "null, or a site with init: regression",
            )
        if self.save_to is not None:
            try:
                self.save_to.format(log_dir="")
            except (LookupError, ValueError):
                allowed = "a folder; {log_dir} stands for the run's log folder"
                raise ConfigError("save_to", repr(self.save_to), allowed) from None
        check_method(self.base, "base")
        return self


def check_method(config: object, where: str) -> None:
    """Make sure that a nested method is one: a config that names it, an object, or null.

    Raises:
        ConfigError: anything else.
    """
    named = isinstance(config, Mapping) and any(
        isinstance(config.get(key), str) and config[key] for key in ("_target_", "name")
    )
    if not (named or config is None or hasattr(config, "run")):
        raise ConfigError(
            where, "names no method", f"method@method.{where}=task_arithmetic, or another"
        )
