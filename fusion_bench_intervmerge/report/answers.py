"""What the models of a run answered for each test image: ``answers.safetensors`` beside its report.

From it come paired differences, whose error is that of the images on which two models differ, and
the gallery. The tensors are ``TASK/label`` and ``TASK/answer/MODEL``, (images) of class indices,
and ``TASK/image/INDEX``, bytes of a PNG, for some images that a merge gets wrong; the metadata
holds the class names as JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..config import ConfigError
from ..files import atomic_file

FILE = "answers.safetensors"
SHOWN = 24  # images per task and merge that are kept to be looked at
SIDE = 128  # pixels of their longer side

Classes = NDArray[np.int32]


@dataclass
class Answers:
    """Class indices by task, in the order of the test images.

    Attributes:
        classes: task -> names of its classes, where they are known.
        labels: task -> (images).
        models: model -> task -> (images).
        images: task -> index -> bytes of a PNG.
    """

    classes: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, Classes] = field(default_factory=dict)
    models: dict[str, dict[str, Classes]] = field(default_factory=dict)
    images: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def right(self, model: str, task: str) -> NDArray[np.bool_]:
        """Which images a model has right."""
        return self.models[model][task] == self.labels[task]

    def keep_images(self, merge: str, datasets: Mapping[str, Sequence[dict[str, object]]]) -> None:
        """Keep images that a merge gets wrong, spread evenly over the test split.

        Args:
            merge: the model's name.
            datasets: task -> items with ``image``, a PIL image.
        """
        for task, answers in self.models[merge].items():
            wrong = np.flatnonzero(answers != self.labels[task])
            places = np.linspace(0, len(wrong) - 1, min(SHOWN, len(wrong))).round().astype(int)
            for index in wrong[places].tolist():
                image = datasets[task][index]["image"]
                if isinstance(image, Image.Image):
                    image = image.convert("RGB")
                    image.thumbnail((SIDE, SIDE))
                    image.save(png := io.BytesIO(), "PNG")
                    self.images.setdefault(task, {})[index] = png.getvalue()

    def write(self, folder: Path) -> None:
        """Write ``answers.safetensors``.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        tensors: dict[str, NDArray[np.generic]] = {}
        for task, labels in self.labels.items():
            tensors[f"{task}/label"] = labels
            for index, png in self.images.get(task, {}).items():
                tensors[f"{task}/image/{index}"] = np.frombuffer(png, np.uint8)
            for model, answers in self.models.items():
                if task in answers:
                    tensors[f"{task}/answer/{model}"] = answers[task]
        with atomic_file(folder / FILE) as temporary:
            save_file(tensors, temporary, {"classes": json.dumps(self.classes)})


def read_answers(folder: Path) -> Answers | None:
    """The answers beside a run's report; None if there are none.

    Raises:
        ConfigError: the file is damaged.
    """
    path, found = folder / FILE, Answers()
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            found.classes = json.loads((file.metadata() or {})["classes"])
            for key in file.keys():  # noqa: SIM118
                task, kind, *name = key.split("/", 2)
                values = file.get_tensor(key)
                if kind == "label":
                    found.labels[task] = values
                elif kind == "answer":
                    found.models.setdefault(name[0], {})[task] = values
                else:
                    found.images.setdefault(task, {})[int(name[0])] = values.tobytes()
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "the file of a run") from None
    return found
