"""Task-conditional models among FusionBench's vision models, and the task pool that evaluates them.

FusionBench's Hugging Face task pool calls a model, projects and normalises its output, and names
the task only then, to ``compute_surgery_features``; its OpenCLIP task pool never names one. The
task pools of this package name the task before the forward pass. In FusionBench's own, the images
of the last forward pass are remembered, and a second pass gives the features of the task.

A task that the model does not know gets the merged encoder's features, and in our task pools'
reports a mark, ``"unseen": true``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from fusion_bench.taskpool import CLIPVisionModelTaskPool as HostCLIPVisionModelTaskPool
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from pydantic import Field
from torch import Tensor, nn

from ..config import ConfigError, Json, Settings
from ..encoders.base import VisionTower
from ..files import write_json
from ..model.model import InterventionModel
from ..model.protocols import TaskConditionalModel
from ..report.answers import Answers, read_answers
from ..results import REFERENCES
from .host import one_line, plain, register_classes
from .images import prepare_images


class _NamedAfterwards(nn.Module):
    """FusionBench's protocol for models whose features depend on the task."""

    is_surgery_model = True  # tells FusionBench to ask ``compute_surgery_features``
    tasks: Any
    encode: Callable[..., Tensor]
    _images: Tensor | None = None

    def _remember(self, images: Tensor) -> None:
        # a copy: the host may fill its buffer with the next batch meanwhile
        self._images = images.detach().clone()

    def compute_surgery_features(
        self, features: Tensor, dataset_name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the images of the last forward pass, for their task.

        ``features`` is the output of that pass, projected and normalised.

        Returns:
            L2-normalised features for the task (batch, projection_dim), ``features``, and the
            difference between the two.

        Raises:
            ValueError: features of other images.
        """
        images, self._images = self._images, None
        if images is None or len(images) != len(features):
            raise ValueError(
                "these features are not those of the last forward pass; use encode(images, task)"
            )
        edited = self.encode(images, dataset_name if dataset_name in self.tasks else None)
        edited = edited / edited.norm(p=2, dim=-1, keepdim=True)
        return edited, features, features - edited


class HostedInterventionModel(_NamedAfterwards, InterventionModel):
    """An ``InterventionModel`` that FusionBench's own task pools evaluate too."""

    def forward(self, pixel_values: Tensor, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """As ``InterventionModel.forward``; without a task, the merged encoder's output.

        Raises:
            ValueError: no task, on an OpenCLIP tower: FusionBench's OpenCLIP task pool never names
                one, so its report would show the merged encoder's numbers as this model's.
        """
        if task is not None or self.task_is_known:
            return super().forward(pixel_values, *args, task=task, **kwargs)
        if self.tower.family == "openclip":
            raise ValueError(
                "no task is named, and this task pool never names one, so its report would "
                "show the merged model; use one of our task pools "
                "(taskpool=openclip-vit-b32_TA8, ...) or encode(images, task)"
            )
        self._remember(pixel_values)
        with self.for_task(None):
            return super().forward(pixel_values, *args, **kwargs)


class HostedModel(_NamedAfterwards):
    """Any task-conditional model, as FusionBench's own task pools evaluate it.

    ``like`` is an encoder of its architecture, for the width that the host's visual projection
    takes and, with OpenCLIP, the images' preprocessing.
    """

    def __init__(self, model: TaskConditionalModel, like: VisionTower):
        super().__init__()
        self.model, self.width, self.tasks = model, like.width, model.tasks
        self.encode, self.extra_parameters = model.encode, model.extra_parameters
        _copy_preprocessing(like, self)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, width) filled with NaN: the features come once the task is named."""
        self._remember(pixel_values)
        return pixel_values.new_full((len(pixel_values), self.width), torch.nan)


def hosted(model: nn.Module, like: VisionTower) -> nn.Module:
    """A model as FusionBench's own task pools can evaluate it; others stay as they are."""
    if isinstance(model, TaskConditionalModel) and not hasattr(model, "is_surgery_model"):
        return HostedModel(model, like)
    return model


class OneTask(nn.Module):
    """A task-conditional model while one task is evaluated: images -> that task's features.

    ``task`` is to be set before; ``merged``: the merged encoder's features, whatever the task.
    """

    def __init__(self, model: TaskConditionalModel, merged: bool = False):
        super().__init__()
        self.model, self.merged = model, merged
        _copy_preprocessing(model, self)
        self.task: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, image_size, image_size) -> (batch, projection_dim), not normalised."""
        if self.merged:
            return self.model.encode(images)
        if self.task is None:
            raise ValueError("no task is named")
        return self.model.encode(images, self.task if self.task in self.model.tasks else None)


def by_task(model: nn.Module) -> Any:
    """A task-conditional model as one whose task is named before; others stay as they are."""
    return OneTask(model) if isinstance(model, TaskConditionalModel) else model


def mark_unseen(report: Json, model: object) -> Json:
    """Mark the tasks of a report that a task-conditional model does not know."""
    if isinstance(model, TaskConditionalModel):
        for task in report.keys() - {"model_info", "average", "confusion", *model.tasks}:
            report[task]["unseen"] = True
    return report


def encode_mixed(model: TaskConditionalModel, images: Tensor, tasks: Sequence[str]) -> Tensor:
    """Features for one task per image; of tasks that the model does not know, the merged ones."""
    seen = [row for row, task in enumerate(tasks) if task in model.tasks]
    if len(seen) == len(tasks):
        return model.encode(images, tasks)
    features = model.encode(images)
    if seen:
        features[seen] = model.encode(images[seen], [tasks[row] for row in seen])
    return features


def _copy_preprocessing(source: object, target: object) -> None:
    for name in ("train_preprocess", "val_preprocess"):
        setattr(target, name, getattr(source, name, None))


class Classes(Settings):
    """The classes of a task, in the order of the labels, and captions with ``{}`` for a class."""

    names: list[str] | None = None
    templates: Annotated[list[str], Field(min_length=1)] = ["a photo of a {}"]  # noqa: RUF012


def name_classes(task: str, dataset: object, given: Json) -> None:
    """Tell FusionBench the classes of a task that it does not know, or that are given.

    Raises:
        ConfigError: nothing names them.
    """
    where, known = f"taskpool.classes.{task}", True
    classes = Classes.read(given, where)
    try:
        get_classnames_and_templates(task)
    except ValueError:
        known = False
    if known and classes.names is None:
        return
    label: Any = (getattr(dataset, "features", None) or {}).get("label")
    names = classes.names or getattr(label, "names", None)
    if names is None:
        problem = "FusionBench does not know the task's classes, and its data set names none"
        raise ConfigError(where, problem, "{names: [ant, bee], templates: ['a photo of a {}']}")
    templates = [partial(str.format, text) for text in classes.templates]
    register_classes(task, [name.replace("_", " ") for name in names], templates)


class Watched:
    """A loader of images and labels, and the classes that a classifier gives to its images."""

    def __init__(self, loader: Any):
        self.loader, self.labels, self.answers = loader, list[Tensor](), list[Tensor]()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for images, labels in self.loader:
            self.labels.append(labels.cpu())
            yield images, labels

    @contextmanager
    def answering(self, classifier: nn.Module) -> Iterator[None]:
        """Note the classifier's answers; not by a hook, which OpenCLIP's classifier passes by."""
        forward = classifier.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            logits = output["logits"] if isinstance(output, Mapping) else output
            self.answers.append(logits.argmax(dim=-1).cpu())
            return output

        classifier.forward = noted
        try:
            yield
        finally:
            del classifier.forward


class Referenced:
    """A task pool that can evaluate what a repair is compared with, beside the repaired model.

    Of the models that have a name it keeps what they answer, in ``answers.safetensors`` beside
    FusionBench's report, unless several processes share the images.

    Attributes:
        references: name -> the merge, once a method wants it evaluated too.
        after_evaluation: called once when the repaired model is evaluated.
        names: ``id`` of a model -> its name in the run's results.
        merges: the names of those that are merges.
    """

    references: Mapping[str, Any] = {}
    after_evaluation: Callable[[], None] | None = None
    names: Mapping[int, str] = {}
    merges: Collection[str] = ()
    _answers: Answers | None = None
    _earlier: Answers | None = None
    _watched: Mapping[str, Watched] = {}

    def _evaluate(
        self, classifier: Any, test_loader: Any, num_classes: int, task_name: Any = None
    ) -> dict[str, float]:
        host, watched = cast(Any, super()), Watched(test_loader)
        self._watched = {**self._watched, task_name: watched}
        with watched.answering(classifier):
            report: dict[str, float] = host._evaluate(classifier, watched, num_classes, task_name)
        return report

    def recall(self: Any, name: str) -> None:
        """Take over what a model answered in an earlier run in the same folder."""
        earlier = self._earlier = self._earlier or read_answers(Path(self.log_dir)) or Answers()
        if name in earlier.models:
            self._answers = self._answers or replace(earlier, models={})
            self._answers.models[name] = earlier.models[name]

    def _keep_answers(self: Any, model: nn.Module) -> None:
        name, watched, self._watched = self.names.get(id(model)), self._watched, {}
        if name is None or not watched or self.fabric.world_size > 1:
            return
        answers = self._answers = self._answers or Answers()
        for task, seen in watched.items():
            with suppress(ValueError):  # FusionBench does not know the task's classes
                answers.classes[task] = list(get_classnames_and_templates(task)[0])
            answers.labels[task] = torch.cat(seen.labels).int().numpy()
            answers.models.setdefault(name, {})[task] = torch.cat(seen.answers).int().numpy()
        if name in self.merges:
            answers.keep_images(name, {t: data.dataset for t, data in self.test_datasets.items()})
        if self.log_dir is not None:
            answers.write(Path(self.log_dir))

    def finish(self: Any, report: Json, model: nn.Module, pretrained: Any = None) -> Json:
        """Mark the unseen tasks, and evaluate the merged encoder, and the pretrained one if given.

        The file ``reference_report.json`` beside FusionBench's report holds their reports by name.
        """
        self._keep_answers(model)
        if id(model) in self.names:
            references, self.references = self.references, {}  # once
            clear, self.after_evaluation = self.after_evaluation, None
            if references:
                self.merges = [*references]
                known = {} if pretrained is None else {"pretrained": pretrained}
                models = {**known, **references}
                self.names = {id(reference): name for name, reference in models.items()}
                reports = {name: self.evaluate(reference) for name, reference in models.items()}
                if self.fabric.is_global_zero and self.log_dir is not None:
                    write_json(Path(self.log_dir) / REFERENCES, reports)
            if clear is not None:
                clear()
        return mark_unseen(report, model)


class CLIPVisionModelTaskPool(Referenced, HostCLIPVisionModelTaskPool):
    """Evaluates Hugging Face's CLIP vision encoders, and any ``TaskConditionalModel``.

    It takes the configs of FusionBench's pool of that name and gives the same numbers; an image of
    a task-conditional model costs one forward pass instead of two.

    Args:
        classes: task -> ``names`` of its classes and ``templates`` of their captions, of tasks that
            FusionBench does not know; what is not given is the data set's own names, and a photo.
    """

    @one_line
    def __init__(
        self, test_datasets: Any, *, classes: Mapping[str, Any] | None = None, **settings: Any
    ):
        if not test_datasets:
            allowed = "modelpool.test_datasets for taskpool=own, or another task pool"
            raise ConfigError("taskpool.test_datasets", "there are none", allowed)
        super().__init__(test_datasets, **settings)
        self._classes = plain(classes) or {}
        self._zero_shot: dict[str, Tensor] = {}  # by task

    def setup(self) -> None:
        """Load the CLIP, the datasets and the processor."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of FusionBench's own class
            super().setup()
        datasets: Any = self.test_datasets
        for task, data in datasets.items():
            name_classes(task, data.dataset, self._classes.get(task, {}))
        prepare_images(self)
        self._pretrained = self.clip_model.vision_model  # evaluating puts another in its place

    @one_line
    def evaluate(self, model: Any, name: str | None = None, **kwargs: Any) -> Json:
        """FusionBench's report: accuracy and loss, per task and on average."""
        report = super().evaluate(by_task(model), name, **kwargs)
        return self.finish(report, model, self._pretrained)

    def on_task_evaluation_begin(self, classifier: Any, task_name: str) -> None:
        """Name the task to the model, and keep the task's head for the models that follow.

        FusionBench encodes all captions anew for every model: minutes at ViT-B/32 on a CPU.
        """
        super().on_task_evaluation_begin(classifier, task_name)
        encode_captions = type(classifier).set_classification_task

        def take_head(classnames: list[str], templates: list[Any]) -> None:
            if task_name not in self._zero_shot:
                encode_captions(classifier, classnames, templates)
                self._zero_shot[task_name] = classifier.zeroshot_weights
            classifier.zeroshot_weights = self._zero_shot[task_name]

        classifier.set_classification_task = take_head
        model = classifier.clip_model.vision_model
        if isinstance(model, OneTask):
            model.task = task_name
            # the output is projected already: edits of the image features come after that
            classifier.get_image_features = model.forward
