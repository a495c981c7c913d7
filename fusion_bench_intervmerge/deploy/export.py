"""Zero-shot heads: class names turned into the matrix that gives logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase
import copy
import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from ..config import ConfigError
from ..encoders.base import VisionTower
from ..encoders.openclip import MEAN, STD, OpenCLIPTower
from ..files import whole_file
from ..interventions.edits import stacked
from ..interventions.functions import Function
from ..interventions.placement import Index, Placement, replace, take
from ..model.model import InterventionModel

# == export.heads
# Zero-shot heads: class names turned into the matrix that gives logits.
Classes = Mapping[str, Mapping[str, Sequence[str]]]


@torch.no_grad()
def zero_shot_heads(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, classes: Classes
) -> dict[str, Tensor]:
    """Each task's classes as text features, times the logit scale.

    A class's text feature is the mean over its captions' normalised features, normalised again
    (section 3.1.4 of arXiv 2103.00020).

    Args:
        clip: Hugging Face's ``CLIPModel``.
        tokenizer: its tokenizer.
        classes: task -> ``{"names": [...], "templates": ["a photo of a {}.", ...]}``.

    Returns:
        task -> (classes, projection_dim); logits are its product with normalised image features.
    """
    heads = {}
    for task, described in classes.items():
        rows = []
        for name in described["names"]:
            captions = [template.format(name) for template in described["templates"]]
            tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            features = F.normalize(clip.get_text_features(**tokens.to(clip.device)), dim=-1)
            rows.append(F.normalize(features.mean(dim=0), dim=-1))
        heads[task] = torch.stack(rows) * clip.logit_scale.exp()
    return heads


# == export.plain
# The repaired encoder as plain modules, for tools that trace a graph.
#
# Hooks and the task of a running forward pass are Python, which a graph has none of. Here the task is
# an input, and every task's edits are tensors that each image picks its own from.
#
def plain_encoder(
    model: InterventionModel,
    tasks: Sequence[str] | None = None,
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PlainEncoder:
    """A repaired model as one graph of plain modules.

    Args:
        model: it is not changed.
        tasks: the tasks to take along, whose order the graph's task indices follow; all of the
            model's where None.
        heads: task -> its classes' text features times the logit scale, (classes,
            projection_dim); with them the graph gives logits too.
        dtype: of the weights; images come and features leave in fp32 whatever it is.

    Raises:
        ConfigError: no task, an unknown one, a task without a head, an encoder of a family that is
            no plain vision transformer.
    """
    tasks = list(model.tasks if tasks is None else tasks)
    if not tasks:
        raise ConfigError("tasks", "there is no task to export", ", ".join(model.tasks))
    for task in tasks:
        if task not in model.tasks:
            raise ConfigError("tasks", f"the model has no task {task!r}", ", ".join(model.tasks))
        if heads is not None and task not in heads:
            raise ConfigError("classes", f"there are none for task {task!r}", "classes a task")
    if len(set(tasks)) != len(tasks):
        raise ConfigError("tasks", "a task is named twice", ", ".join(model.tasks))
    edits = {
        (site, block): TaskEdits(placement, block, functions)
        for site, placement in model.placements.items()
        for block in placement.blocks
        if any(functions := [model.edits_of(task).at(site, block) for task in tasks])
    }
    for site, _ in edits:
        if site not in PLACES:
            allowed = f"edits at {', '.join(PLACES)}"
            raise ConfigError(f"interventions.{site}", "the graph has no such place", allowed)
    in_order = None if heads is None else [heads[task] for task in tasks]
    encoder = PlainEncoder(_plain_tower(model.tower), edits, in_order)
    # A copy: up to here the weights are the model's own.
    return copy.deepcopy(encoder).to("cpu", dtype).requires_grad_(False).eval()


PLACES = ("attention", "mlp", "block", "output")  # where the graph below takes edits


class PlainEncoder(nn.Module):
    """A CLIP vision transformer with every task's edits in it.

    Args:
        tower: whose weights it shares, without the modules that carry hooks.
        edits: by site and block; ``("output", 0)`` for the image features.
        heads: for each task (classes, projection_dim), or None.
    """

    def __init__(
        self,
        tower: OpenCLIPTower,
        edits: Mapping[tuple[str, int], TaskEdits],
        heads: Sequence[Tensor] | None = None,
    ):
        super().__init__()
        visual = tower.visual
        self.patches, self.ln_pre, self.ln_post = visual.conv1, visual.ln_pre, visual.ln_post
        self.class_token, self.positions = visual.class_embedding, visual.positional_embedding
        self.projection = visual.proj
        self.blocks = nn.ModuleList(
            Block(block, {site: edit for (site, b), edit in edits.items() if b == index})
            for index, block in enumerate(visual.transformer.resblocks)
        )
        self.edit = edits.get(("output", 0))
        self.heads = None if heads is None else Heads(heads)
        self.image_size = tower.spec()["image_size"]

    def forward(self, pixel_values: Tensor, task: Tensor) -> tuple[Tensor, ...]:
        """Image features of a batch whose images may be of different tasks.

        Args:
            pixel_values: (batch, 3, image_size, image_size), fp32.
            task: (batch,), int64, each image's index among the exported tasks.

        Returns:
            Image features (batch, projection_dim), not normalised, fp32; with heads also logits
            (batch, classes of the task that has most), minus infinity behind a task's own classes.
        """
        x = self.patches(pixel_values.to(self.projection.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1) + self.positions
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, task)
        features = self.ln_post(x[:, 0]) @ self.projection
        if self.edit is not None:
            features = self.edit(features.unsqueeze(1), task).squeeze(1)
        if self.heads is None:
            return (features.float(),)
        return features.float(), self.heads(features, task)


class Block(nn.Module):
    """A residual block: self-attention and MLP, each behind its layer norm, and the edits.

    Args:
        block: OpenCLIP's.
        edits: by site.
    """

    heads: int
    qkv: nn.Linear
    out: nn.Linear

    def __init__(self, block: Any, edits: Mapping[str, nn.Module]):
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.heads = attention.num_heads
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.qkv = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.up, self.activation, self.down = mlp.c_fc, mlp.gelu, mlp.c_proj
        self.edits = nn.ModuleDict(dict(edits))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """(batch, tokens, width), (batch,) -> (batch, tokens, width)."""
        # (batch, tokens, 3 * width) -> three times (batch, heads, tokens, width / heads)
        split = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(split[0], split[1], split[2])
        x = x + self._edited("attention", self.out(z.transpose(1, 2).flatten(2)), task)
        z = self.down(self.activation(self.up(self.ln_2(x))))
        return self._edited("block", x + self._edited("mlp", z, task), task)

    def _edited(self, site: str, z: Tensor, task: Tensor) -> Tensor:
        return self.edits[site](z, task) if site in self.edits else z


class TaskEdits(nn.Module):
    """The edits of all tasks at one site of one block: z (batch, tokens, width) -> the same.

    A task of a lower rank, or without an edit here, is filled up with zeros, as in the model.

    Args:
        placement: the site's.
        block: which block's part to take.
        functions: one a task; None for a task without an edit here.
    """

    tokens: Index
    part: Index

    def __init__(self, placement: Placement, block: int, functions: Sequence[Function | None]):
        super().__init__()
        form = next(function for function in functions if function is not None)
        # A bound method, not the module: its tensors must not be among this module's.
        self._formula = form.edit
        self.copies = placement.copies is not None
        # The features are one token.
        self._place("tokens", slice(0, 1) if placement.tokens is None else placement.tokens)
        self._place("part", placement.parts[block])
        terms = form.terms(**stacked(functions))
        self.names = list(terms)
        for name, term in terms.items():
            self.register_buffer(name, term.detach())

    def forward(self, z: Tensor, task: Tensor) -> Tensor:
        terms = {n: self.get_buffer(n).index_select(0, task) for n in self.names}
        rows = take(z, 1, self.tokens)
        vectors = take(rows, 2, self.part)
        if self.copies:
            edited = self._formula(vectors.unsqueeze(-2), **terms).squeeze(-2)
        else:
            edited = self._formula(vectors, **terms)
        return replace(z, 1, self.tokens, replace(rows, 2, self.part, edited))

    def _place(self, name: str, index: Index) -> None:
        if isinstance(index, slice):
            setattr(self, name, index)
        else:  # a copy: exporters lose track of a tensor that several blocks share
            self.register_buffer(name, index.clone())


class Heads(nn.Module):
    """Zero-shot heads: image features (batch, projection_dim) -> logits (batch, classes), fp32.

    Args:
        heads: for each task (classes, projection_dim).
    """

    def __init__(self, heads: Sequence[Tensor]):
        super().__init__()
        most = max(len(head) for head in heads)
        filled = [F.pad(head, (0, 0, 0, most - len(head))) for head in heads]
        self.register_buffer("weights", torch.stack(filled))
        beyond = torch.tensor([[c >= len(head) for c in range(most)] for head in heads])
        self.register_buffer("beyond", beyond)

    def forward(self, features: Tensor, task: Tensor) -> Tensor:
        weights, beyond = (self.get_buffer(n).index_select(0, task) for n in ("weights", "beyond"))
        direction = F.normalize(features.float(), dim=-1)
        logits = (weights.float() @ direction.unsqueeze(-1)).squeeze(-1)
        return logits.masked_fill(beyond, float("-inf"))


def _plain_tower(tower: VisionTower) -> OpenCLIPTower:
    """OpenCLIP's transformer is the plainer of the two; the other's weights fit it."""
    if isinstance(tower, OpenCLIPTower):
        return tower
    if tower.family == "huggingface":
        from ..encoders.convert import to_openclip

        try:  # the normalisation is the preprocessing's; no graph holds it
            return to_openclip(tower, MEAN, STD)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError("model", str(error)) from None
    raise ConfigError("model", f"no graph is known for {tower.family}", "huggingface, openclip")


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.load_state_dict({"weight": weight.detach(), "bias": bias.detach()}, assign=True)
    return linear


# == export.files
# Graphs on the disk: ONNX and torch's own format, which need nothing of this package to run.
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
