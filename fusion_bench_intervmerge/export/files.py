"""Graphs on the disk: ONNX and torch's own format, which need nothing of this package to run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import whole_file
from ..model import InterventionModel
from .plain import PlainEncoder, plain_encoder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float32}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
# A protocol buffer holds no more than 2 GiB; some room is for the graph itself.
MOST_BYTES = 2**31 - 2**26
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
) -> Path:
    """Write a repaired model as one graph: (pixel_values, task) -> image features.

    The inputs are ``pixel_values`` (batch, 3, image_size, image_size), fp32, and ``task`` (batch,),
    int64: each image's index among the exported tasks. The outputs are ``image_features`` (batch,
    projection_dim) and, with ``heads``, ``logits`` (batch, classes). The file says the tasks in
    their order, the classes and the preprocessing as JSON: ONNX in its metadata under ``tasks``,
    ``classes`` and ``preprocessor``, torch's format in its extra file ``intervmerge.json``.

    Args:
        model: it is not changed.
        file: to write, whole or not at all.
        to: ``onnx``, or ``torch`` for ``torch.export.load``.
        tasks: which to take along, all where None.
        fold: whether to bring the edits into the form that needs least at first.
        dtype: of the weights: ``fp32``, ``fp16``, or ``int8`` (ONNX), in which the matrices of the
            encoder are kept in 8 bits and multiplied in fp32. Images and outputs are fp32.
        heads: as ``plain_encoder`` takes them.
        classes: task -> names of its classes, to be kept in the file.

    Returns:
        The file.

    Raises:
        ConfigError: an unknown format or dtype, a package that is not installed, a model that is
            too large for one ONNX file, a file that cannot be written, or what ``plain_encoder``
            raises.
    """
    if to not in SUFFIXES:
        raise ConfigError("to", f"unknown: {to!r}", ", ".join(SUFFIXES))
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"unknown: {dtype!r}", ", ".join(DTYPES))
    if to == "torch" and dtype == "int8":
        raise ConfigError("dtype", "int8 is onnxruntime's", "fp32, fp16, or to=onnx")
    tasks = list(model.tasks if tasks is None else tasks)
    encoder = plain_encoder(model.fold() if fold else model, tasks, heads, DTYPES[dtype])
    facts = {
        "tasks": tasks,
        "classes": {t: list(names) for t, names in (classes or {}).items() if t in tasks},
        "preprocessor": model.metadata.get("preprocessor"),
    }
    path = Path(file)
    with whole_file(path) as temporary:
        if to == "onnx":
            _write_onnx(encoder, temporary, facts, dtype)
        else:
            extra = {"intervmerge.json": json.dumps(facts)}
            # torch asks for its own suffix, which a temporary name lacks
            with temporary.open("wb") as stream:
                torch.export.save(_graph(encoder), stream, extra_files=extra)  # type: ignore[arg-type]
        temporary.chmod(0o644)
    return path


def _graph(encoder: PlainEncoder) -> torch.export.ExportedProgram:
    size = encoder.image_size
    images = torch.zeros(2, 3, size, size)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            encoder,
            (images, torch.zeros(2, dtype=torch.long)),
            dynamic_shapes=({0: batch}, {0: batch}),
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody else's business
    return program


def _write_onnx(encoder: PlainEncoder, file: Path, facts: Mapping[str, object], dtype: str) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401

        quantizer = _quantizer() if dtype == "int8" else None
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        extra = "pip install 'fusion-bench-intervmerge[export]'"
        raise ConfigError("to", f"{name} is not installed", extra) from None
    tensors = [*encoder.parameters(), *encoder.buffers()]
    if sum(t.numel() * t.element_size() for t in tensors) > MOST_BYTES:
        raise ConfigError(
            "to", "the weights are more than the 2 GiB of an ONNX file", "torch, or dtype=fp16"
        )
    names = ["image_features", "logits"][: 1 if encoder.heads is None else 2]
    program = torch.onnx.export(
        _graph(encoder),
        dynamo=True,
        output_names=names,
        dynamic_shapes=({0: "batch"}, {}),  # a name for what the graph knows already
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # the exporter's notes, often larger than the weights
    if quantizer is not None:
        in_8_bits = quantizer(proto, bits=8, block_size=INT8_GROUP)
        in_8_bits.process()
        proto = in_8_bits.model.model
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(proto, file)


def _quantizer() -> type:
    """onnxruntime's tool that keeps matrices in fewer bits."""
    # Its module sets up logging for the whole process, unless somebody did.
    root, somebody = logging.getLogger(), logging.NullHandler()
    root.addHandler(somebody)
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        root.removeHandler(somebody)
    return MatMulNBitsQuantizer
