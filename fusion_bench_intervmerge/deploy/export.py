"""A model as one graph that runs without this package: ONNX, or torch's own format.

What is traced is the tower itself, with hooks: they are Python, which runs while a graph is
recorded. The task is an input, from which each image picks its own rows of the edits' tensors.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..files import atomic_file
from ..interventions.edits import stacked
from ..interventions.functions import Function
from ..interventions.placement import Placement
from ..model.model import InterventionModel
from .heads import Heads

log = logging.getLogger(__name__)
Tell = Callable[[str], object]  # takes what is being done

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
DTYPES = ("fp32", "fp16", "int8")
# A protocol buffer holds no more than 2 GiB; some room is for the graph itself.
MAX_BYTES = 2**31 - 2**26
# Weights that share a scale and a zero point, one behind the other in a row of a matrix.
INT8_GROUP = 32


def export(
    model: InterventionModel,
    file: str | Path,
    to: str = "onnx",
    *,
    tasks: Sequence[str] | None = None,
    fold: bool = False,
    dtype: str = "fp32",
    heads: Mapping[str, Tensor] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    tell: Tell = log.info,
) -> Path:
    """Write a repaired model as one graph: (pixel_values, task) -> image features.

    The inputs are ``pixel_values`` (batch, 3, image_size, image_size), fp32, and ``task`` (batch,),
    int64: each image's index among the exported tasks. The outputs are ``image_features`` (batch,
    projection_dim) and, with ``heads``, ``logits`` (batch, classes), both NaN for an index that no
    task has. The file has the tasks in their order, the classes and the preprocessing as JSON: ONNX
    in its metadata under ``tasks``, ``classes`` and ``preprocessor``, torch's format in its extra
    file ``intervmerge.json``. A router is not exported.

    Args:
        model: it is not changed.
        file: to write, whole or not at all.
        to: ``onnx``, or ``torch`` for ``torch.export.load``.
        tasks: which to export, in the order of their indices; by default all.
        fold: whether to fold the edits first.
        dtype: of the encoder's weights: ``fp32``, ``fp16``, or ``int8`` (ONNX), in which its
            matrices are stored in 8 bits and multiplied in fp32. Images and outputs are fp32.
        heads: task -> its classes' text features times the logit scale, (classes, projection_dim).
        classes: task -> names of its classes, to be stored in the file.
        tell: called with what is being done.

    Returns:
        The file.

    Raises:
        ConfigError: an unknown format, dtype or task, a task without a head, a package that is not
            installed, a model that is too large for one ONNX file, a file that cannot be written.
    """
    if to not in SUFFIXES:
        raise ConfigError("to", f"unknown: {to!r}", ", ".join(SUFFIXES))
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"unknown: {dtype!r}", ", ".join(DTYPES))
    if to == "torch" and dtype == "int8":
        raise ConfigError("dtype", "int8 is onnxruntime's", "fp32, fp16, or to=onnx")
    tasks = list(dict.fromkeys(model.tasks if tasks is None else tasks))
    if not tasks:
        raise ConfigError("tasks", "there is no task to export", ", ".join(model.tasks))
    for task in tasks:
        if task not in model.tasks:
            raise ConfigError("tasks", f"the model has no task {task!r}", ", ".join(model.tasks))
        if heads is not None and task not in heads:
            raise ConfigError("classes", f"there are none for task {task!r}", "classes per task")
    in_order = None if heads is None else [heads[task] for task in tasks]
    weights = torch.float16 if dtype == "fp16" else torch.float32
    graph = Graph(model.fold() if fold else copy.deepcopy(model), tasks, in_order, weights)
    facts = {
        "tasks": tasks,
        "classes": {t: list(names) for t, names in (classes or {}).items() if t in tasks},
        "preprocessor": model.metadata.get("preprocessor"),
    }
    with atomic_file(Path(file)) as temporary:
        if to == "onnx":
            _write_onnx(graph, temporary, facts, dtype, tell)
        else:
            program, extra = _traced(graph, tell), {"intervmerge.json": json.dumps(facts)}
            tell("writing the file")
            # torch asks for its own suffix, which a temporary name lacks
            with temporary.open("wb") as stream:
                torch.export.save(program, stream, extra_files=extra)
        temporary.chmod(0o644)
    return Path(file)


class Graph(nn.Module):
    """A model as a function of tensors alone: what is traced.

    Args:
        model: it is used up.
        tasks: whose edits to include.
        heads: for each task (classes, projection_dim), or None.
        dtype: of the tower's weights.
    """

    def __init__(
        self,
        model: InterventionModel,
        tasks: Sequence[str],
        heads: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tower, self.tasks = model.tower.to(dtype), len(tasks)
        self.heads = None if heads is None else Heads(heads)
        self.edits = nn.ModuleList()
        for site, placement in model.placements.items():
            for block in placement.blocks:
                functions = [model.edits_of(task).at(site, block) for task in tasks]
                if any(functions):
                    self.edits.append(TaskEdits(placement, site, block, functions))
                    self.tower.tap(site, block)  # made when it is first asked for
        self.cpu().requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor, task: Tensor) -> tuple[Tensor, ...]:
        """Image features, and logits with heads; see ``export``."""
        unknown = ((task < 0) | (task >= self.tasks)).unsqueeze(-1)
        task = task.clamp(0, self.tasks - 1)
        with ExitStack() as hooks:
            for edits in cast("Sequence[TaskEdits]", self.edits):
                tap = self.tower.tap(edits.site, edits.block)
                hooks.callback(tap.register_forward_hook(partial(edits.hook, task)).remove)
            features = self.tower.features(pixel_values.to(self.tower.dtype)).float()
        outputs = [features] if self.heads is None else [features, self.heads(features, task)]
        return tuple(output.masked_fill(unknown, float("nan")) for output in outputs)


class TaskEdits(nn.Module):
    """The edits of several tasks in one place; each image's task picks its tensors.

    The tensors stay fp32: rounding them only after their sums are formed loses less. They are
    stacked once, not in every run as ``InterventionModel.for_tasks`` would.
    """

    def __init__(
        self, placement: Placement, site: str, block: int, functions: Sequence[Function | None]
    ):
        super().__init__()
        self.placement, self.site, self.block = placement, site, block
        form = next(function for function in functions if function is not None)
        self.formula, self.copies = form.edit, form.copies
        terms = form.terms(**stacked(functions))
        self.terms = nn.ParameterDict({name: term.detach() for name, term in terms.items()})

    def hook(self, task: Tensor, tap: nn.Module, args: object, z: Tensor) -> Tensor:
        """A forward hook on the site's tap."""
        terms = {n: t.index_select(0, task).to(z.dtype) for n, t in self.terms.items()}

        def edit(vectors: Tensor) -> Tensor:
            if self.copies is None:
                return self.formula(vectors, **terms)
            return self.formula(vectors.unsqueeze(-2), **terms).squeeze(-2)

        return self.placement.apply(z, self.block, edit)


def _traced(graph: Graph, tell: Tell) -> torch.export.ExportedProgram:
    """The graph as torch records it, for batches of any size."""
    tell("tracing the encoder")
    size, batch = graph.tower.image_size, torch.export.Dim("batch")
    example = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.long)
    shapes = {0: batch}, {0: batch}
    with torch.no_grad():
        program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody else's business
    return program


def _write_onnx(
    graph: Graph, file: Path, facts: Mapping[str, object], dtype: str, tell: Tell
) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401

        quantizer = _quantizer() if dtype == "int8" else None
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        extra = "pip install 'fusion-bench-intervmerge[export]'"
        raise ConfigError("to", f"{name} is not installed", extra) from None
    if sum(t.numel() * t.element_size() for t in graph.state_dict().values()) > MAX_BYTES:
        raise ConfigError(
            "to", "the weights are more than the 2 GiB of an ONNX file", "torch, or dtype=fp16"
        )
    program = _traced(graph, tell)
    tell("translating the graph to ONNX")
    translated = torch.onnx.export(
        program,
        dynamo=True,
        output_names=["image_features", "logits"][: 1 if graph.heads is None else 2],
        dynamic_shapes=({0: "batch"}, {}),  # a name for what the graph knows already
        verbose=False,
    )
    assert translated is not None
    proto = translated.model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # the exporter's notes, often larger than the weights
    if quantizer is not None:
        tell("rounding the matrices to 8 bits")
        rounded = quantizer(proto, bits=8, block_size=INT8_GROUP)
        rounded.process()
        proto = rounded.model.model
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    tell("writing the file")
    onnx.save(proto, file)


def _quantizer() -> type:
    """onnxruntime's tool that stores matrices in fewer bits."""
    # Importing it sets up logging for the whole process, unless that is set up already.
    root, placeholder = logging.getLogger(), logging.NullHandler()
    root.addHandler(placeholder)
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        root.removeHandler(placeholder)
    return MatMulNBitsQuantizer
