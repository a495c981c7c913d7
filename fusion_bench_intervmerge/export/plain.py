"""The repaired encoder as plain modules, for tools that trace a graph.

Hooks and the task of a running forward pass are Python, which a graph has none of. Here the task is
an input, and every task's edits are tensors that each image picks its own from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders import VisionTower
from ..encoders.openclip import MEAN, STD, OpenCLIPTower
from ..errors import ConfigError
from ..interventions import Function, Placement
from ..interventions.placement import Index, replace, take
from ..interventions.stacking import stacked
from ..model import InterventionModel


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
