"""What a run found, as data: one layout for repairs, comparisons and saved models evaluated later.

``intervmerge.json`` in a run's folder holds a ``Results``. FusionBench evaluates the models after
the run has written it, so that accuracies are in ``program_report.json`` beside it. Nothing in it
is a sentence: words are made where something is shown.
"""
# ruff: noqa: RUF012 - pydantic copies defaults that are mutable

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .config import ConfigError, Json, Settings
from .files import write_json

VERSION: Literal[1] = 1
FILE = "intervmerge.json"
REFERENCES = "reference_report.json"  # FusionBench's reports of merge and pretrained encoder


class ImagesUsed(Settings):
    """Unlabelled images that edits were found on.

    Attributes:
        split, fraction, at_most: which split, what share of it, and at most how many per task.
        solved: whether edits were solved on them in closed form.
        steps, batch_size: of the training, per task; no steps: not trained.
        seed: decides which images of the split, and their order.
        transductive: whether results are measured on the very same split.
        tasks: whose images they are; empty: of all tasks.
    """

    split: str
    fraction: float = 1.0
    at_most: int | None = None
    solved: bool = False
    steps: int = 0
    batch_size: int | None = None
    seed: int | None = None
    transductive: bool = False
    tasks: list[str] = []

    def in_words(self, seed: bool = True) -> str:
        """``10% of the validation split, unlabelled, 200 steps of 16 images per task, seed 0``."""
        which = f"{self.fraction:.0%} of the {self.split} split"
        if self.at_most is not None:
            which += f", at most {self.at_most} images per task"
        how = ["solved in closed form"] if self.solved else []
        if self.steps:
            how.append(f"{self.steps} steps of {self.batch_size} images per task")
        text = f"{which}, unlabelled, {', then '.join(how) or 'not trained'}"
        text = f"{', '.join(self.tasks)}: {text}" if self.tasks else text
        return f"{text}, seed {self.seed}" if seed and self.seed is not None else text


class Result(Settings, allow_inf_nan=True):  # a loss may overflow
    """One model of a run.

    Attributes:
        kind: what it is. A ``rival`` is anything but a repair that answers for a task.
        base: name of the merge; None for a model that comes from none.
        method: name of the repair or rival, as the run's configuration has it.
        seed: the repair's.
        rank: of its edits, if all have the same; None: they differ, or there are none.
        budget: extra parameters over all tasks that were given out as ranks.
        settings: of the method, as the run read them.
        extra_parameters: what inference needs beyond one merged model, over all tasks; ``_folded``
            after folding, ``_by_task`` as trained.
        bytes: the same in bytes, as saved.
        passes: of an encoder, per image.
        needs_task: whether the task of an image has to be given.
        labels: labelled images per task that it was made with.
        images: what the edits were found on; several if tasks joined later, none: not known.
        images_seen: task -> how many these were.
        seconds: wall-clock time of merging or repairing; ``seconds_by_part`` what of it took long.
        resumed_at: the step at which a stopped training went on.
        final_loss: the last step's, mean over tasks.
        features: task -> ``bias_before``, ``bias_after`` (mean L1 to the expert's features) and
            perhaps ``agreement_before``, ``agreement_after`` (shares of equal predictions).
        losses: task -> the loss at each step.
    """

    kind: Literal["pretrained", "merge", "repair", "rival", "experts"]
    base: str | None = None
    method: str | None = None
    seed: int | None = None
    rank: int | None = None
    budget: int | None = None
    settings: Json = {}
    extra_parameters: int | None = None
    extra_parameters_folded: int | None = None
    extra_parameters_by_task: dict[str, int] = {}
    bytes: int | None = None
    passes: float | None = None
    needs_task: bool | None = None
    labels: int | None = None
    images: list[ImagesUsed] = []
    images_seen: dict[str, int] = {}
    seconds: float | None = None
    seconds_by_part: dict[str, float] = {}
    resumed_at: int | None = None
    final_loss: float | None = None
    features: dict[str, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}

    @property
    def transductive(self) -> bool | None:
        """Whether any of its images are of the split that it is tested on; None: not known."""
        return any(images.transductive for images in self.images) if self.images else None


class Results(Settings):
    """What a run found.

    Attributes:
        version: of this layout.
        tasks: in the pool's order.
        models: every model by the name under which FusionBench reports its accuracies.
        problems: what did not run -> why, in one line.
    """

    version: Literal[1] = VERSION
    tasks: list[str]
    models: dict[str, Result]
    problems: dict[str, str] = {}

    def write(self, folder: str | Path | None) -> None:
        """Write ``intervmerge.json``; None: nowhere."""
        if folder is not None:
            content = {"version": self.version, **self.model_dump(exclude_defaults=True)}
            write_json(Path(folder) / FILE, content)


def parse_results(content: object, where: str) -> Results:
    """Check the JSON value of a file, which errors call ``where``.

    Raises:
        ConfigError: another version, or what does not fit, in one line.
    """
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        found = "no version of the results" if version is None else f"version {version!r:.20}"
        raise ConfigError(where, f"holds {found}", f"version {VERSION}; run it again to have it")
    return Results.read(content, where)


def in_words(images: object) -> str:
    """The images of a saved model's metadata in words; what are words already stays."""
    if not isinstance(images, list):
        return str(images)
    return "; ".join(
        one if isinstance(one, str) else ImagesUsed.read(one, "images").in_words() for one in images
    )
