"""``intervmerge export``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.model import InterventionModel
    from .export import Classes


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command to a parser's."""
    export = commands.add_parser(
        "export",
        help="a saved model as one ONNX or torch.export file",
        description="Write a saved model as one graph that takes images and task indices, and "
        "that runs without this package.",
    )
    export.add_argument(
        "model", metavar="FOLDER", help="a saved model's folder, or its id on a hub"
    )
    export.add_argument("--to", choices=("onnx", "torch"), default="onnx", help="default: onnx")
    export.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all, in their order")
    export.add_argument("--fold", action="store_true", help="fold the edits first")
    export.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="of the weights; int8 keeps the encoder's matrices in 8 bits (ONNX). Default: fp32",
    )
    export.add_argument(
        "--logits", action="store_true", help="logits of the tasks' class names as well"
    )
    export.add_argument(
        "--classes",
        metavar="FILE",
        help='JSON: {"task": {"names": [...], "templates": ["a photo of a {}."]}}, and --logits; '
        "default: what the model knows of its tasks",
    )
    export.add_argument(
        "--clip",
        metavar="CLIP",
        help="for --logits: folder or id of the CLIP whose text tower reads the names; default: "
        "the one that the experts started from",
    )
    export.add_argument(
        "--to-file", metavar="FILE", help="default: FOLDER.onnx or FOLDER.pt2, beside the folder"
    )
    export.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the file, and say what is in it."""
    from ..model.model import InterventionModel
    from .export import SUFFIXES, export

    model = InterventionModel.from_pretrained(options.model)
    heads, names = None, None
    if options.logits or options.classes:
        given = None if options.classes is None else read_classes(Path(options.classes))
        heads, names = known_heads(model, options.tasks, given, options.clip)
    folder = Path(options.model).absolute()
    beside = folder.parent if folder.exists() else Path()
    file = options.to_file or beside / f"{folder.name}{SUFFIXES[options.to]}"
    file = export(
        model,
        file,
        options.to,
        tasks=options.tasks,
        fold=options.fold,
        dtype=options.dtype,
        heads=heads,
        classes=names,
    )
    tasks = options.tasks or model.tasks
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {options.dtype}")
    console.print(f"task: {', '.join(f'{index} {task}' for index, task in enumerate(tasks))}")


def known_heads(
    model: InterventionModel,
    tasks: list[str] | None = None,
    classes: Classes | None = None,
    clip: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Zero-shot heads of a model's tasks, and the names of their classes.

    Args:
        model: whose metadata tells what is not given.
        tasks: the model's where None.
        classes: as ``zero_shot_heads`` takes them.
        clip: as ``to_clip_model`` takes it.

    Raises:
        ConfigError: no classes are known for a task, or no CLIP.
    """
    from .clip import load_clip, load_tokenizer
    from .export import zero_shot_heads

    known = classes if classes is not None else model.metadata.get("classes") or {}
    wanted = {}
    for task in tasks or model.tasks:
        if task not in known:
            allowed = '--classes FILE with {"task": {"names": [...], "templates": [...]}}'
            raise ConfigError("classes", f"none are known for task {task!r}", allowed)
        wanted[task] = known[task]
    heads = zero_shot_heads(load_clip(model, clip), load_tokenizer(model, clip), wanted)
    return heads, {task: list(described["names"]) for task, described in wanted.items()}


def read_classes(file: Path) -> Classes:
    """The classes of tasks from a JSON file, as ``zero_shot_heads`` takes them.

    Raises:
        ConfigError: it is not found, or not of that form.
    """
    form = '{"task": {"names": ["cat", ...], "templates": ["a photo of a {}.", ...]}, ...}'
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--classes {file}", f"not readable as JSON ({error})", form) from None
    if not isinstance(classes, dict) or not all(map(_is_described, classes.values())):
        raise ConfigError(f"--classes {file}", "not of this form", form)
    return classes


def _is_described(task: object) -> bool:
    return isinstance(task, dict) and all(
        isinstance(task.get(key), list) and task[key] and all(isinstance(x, str) for x in task[key])
        for key in ("names", "templates")
    )
