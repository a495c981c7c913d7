"""Every setting of a repair: what ``method.KEY`` and ``IntervMergeAlgorithm`` take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..errors import ConfigError
from ..interventions import read_interventions
from ..merging import CoefficientSettings
from ..settings import Flag, Folder, Seed, Settings, nested, whole

OPTIONAL_FOLDER = Field(description="null, or the path of a folder")
OPTIMIZER = {"_target_": "torch.optim.Adam", "lr": 3e-3}


class DataSettings(Settings):
    """The unlabelled images to learn from.

    Args:
        split: ``test``, ``validation`` or ``train``: where they come from.
        fraction: share of that split that may be seen; the same images for every method at a seed.
        images: at most so many images a task; null: as many as ``fraction`` says.
        batch_size: images a task and step, over all processes.
        num_workers: processes that decode images.
        cache_gb: GiB of memory for the states of images that are seen again.
    """

    split: Literal["test", "validation", "train"] = "test"
    fraction: Annotated[float, Field(gt=0, le=1, description="a fraction in (0, 1]")] = 1.0
    images: Annotated[int | None, whole(1, 10**9, before="null, or ")] = None
    batch_size: Annotated[int, whole(1, 10**6)] = 16
    num_workers: Annotated[int, whole(0, 1024)] = 0
    cache_gb: Annotated[float, Field(ge=0, le=10**6, description="a number, 0 or more")] = 2.0


class MethodSettings(Settings):
    """The settings of ``method=intervmerge``, ``surgery`` and ``surgery_v2``.

    Args:
        interventions: site -> edit settings (``InterventionConfig``).
        base: config of the FusionBench method that merges the experts, any of them:
            ``method@method.base=ties_merging``; a ``_merged_`` model in the pool wins over it, and
            ``coefficients`` over both.
        budget: extra parameters over all tasks, given out as ranks where they help most; for
            ``init: regression``. Null: every edit has the ``rank`` of its site.
        coefficients: merge by task vectors with these coefficients instead
            (``CoefficientSettings``).
        loss: ``output``, the mean L1 of the image features, or ``blocks``, which adds that of every
            block's token mean (SurgeryV2).
        data: the unlabelled images to learn from (``DataSettings``).
        steps: steps a task; each shows every task one batch of its images. 0: no training.
        optimizer: config of any torch optimizer. The published optimizer lists every parameter
            three times, so that each of its steps at 1e-3 is three steps of Adam; hence 3e-3.
        seed: decides initial edits, images and their order.
        save_to: folder for the artifact; ``{log_dir}`` stands for the run's log folder.
        resume: ``auto`` continues a run of the same settings that was stopped, and takes from the
            cache folder the coefficients that an earlier run of AdaMerging found on the pool and
            the experts' features of the same images (2 GiB at most are kept); ``never`` does not.
        save_every: steps between two states of a run that may be stopped.
        compile: compile the encoder's MLPs for the training; it takes about half a minute, and pays
            in long runs of wide encoders.
        extend: folder of a saved model, to which the pool's new tasks are added; nothing is merged
            and its own ``interventions`` hold.

    Raises:
        ConfigError: the first setting that does not fit.
    """

    interventions: Any
    base: Any = None
    budget: Annotated[int | None, whole(1, 10**12, before="null, or ")] = None
    coefficients: Annotated[CoefficientSettings, nested(CoefficientSettings)] | None = None
    loss: Literal["output", "blocks"] = "output"
    data: Annotated[DataSettings, nested(DataSettings)] = DataSettings()
    steps: Annotated[int, whole(0, 10**7)] = 1000
    optimizer: Annotated[dict[str, Any], Field(description=f"a mapping like {OPTIMIZER}")] = Field(
        default=OPTIMIZER
    )
    seed: Seed = 0
    save_to: Annotated[Folder | None, OPTIONAL_FOLDER] = None
    resume: Literal["auto", "never"] = "auto"
    save_every: Annotated[int, whole(1, 10**7)] = 100
    compile: Flag = False
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


def check_method(config: Any, where: str) -> None:
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
