"""Where an edit acts: which blocks, which token positions, which slice of the width.

Everything is worked out once from the encoder's own sizes; at run time an edit is a view of the
site's tensor, a function, and a new tensor with the edited vectors in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ConfigError
from .config import InterventionConfig, PartSettings
from .sites import SITES, Site

Index = slice | Tensor


def resolve_blocks(blocks: str | Sequence[int], num_blocks: int) -> list[int]:
    """Block indices, ascending, that ``blocks`` names in an encoder of ``num_blocks``.

    Raises:
        ConfigError: an unknown pattern or a block that does not exist.
    """
    patterns = "all, every_n, first_n, middle_n, last_n or a list of indices"
    allowed = f"{patterns}, for {num_blocks} blocks (0 to {num_blocks - 1})"
    if not isinstance(blocks, str):
        return _positions(blocks, num_blocks, "blocks", "block", allowed)
    pattern = "every_1" if blocks == "all" else blocks
    match = re.fullmatch(r"(every|first|middle|last)_(\d+)", pattern)
    if not match or not 1 <= int(match[2]) <= num_blocks:
        raise ConfigError("blocks", f"{blocks!r} does not name blocks", allowed)
    pattern, count = match[1], int(match[2])
    if pattern == "every":
        return list(range(0, num_blocks, count))
    others = num_blocks - count
    start = {"first": 0, "middle": others // 2, "last": others}[pattern]
    return list(range(start, start + count))


def resolve_tokens(tokens: str | Sequence[int], num_tokens: int, prefix_tokens: int = 1) -> Index:
    """Token positions as a slice if they are contiguous, else as an index tensor.

    ``prefix_tokens`` stand before the patches: the class token, and registers behind it.

    Raises:
        ConfigError: an unknown name or a position that does not exist.
    """
    middle = prefix_tokens + (num_tokens - prefix_tokens + 1) // 2 - 1
    named = {
        "class": slice(0, 1),
        "first": slice(prefix_tokens, prefix_tokens + 1),
        "middle": slice(middle, middle + 1),
        "last": slice(num_tokens - 1, num_tokens),
        "patch": slice(prefix_tokens, num_tokens),
        "all": slice(0, num_tokens),
    }
    allowed = f"{', '.join(named)} or a list of positions 0 to {num_tokens - 1}"
    if not isinstance(tokens, str):
        return _index(_positions(tokens, num_tokens, "tokens", "token position", allowed))
    if tokens not in named:
        raise ConfigError("tokens", f"{tokens!r} does not name tokens", allowed)
    return named[tokens]


def resolve_part(
    part: list[int] | list[list[int]] | PartSettings | None,
    width: int,
    block: int,
    edited: Sequence[int] = (),
) -> Index:
    """Entries of the width that an edit in ``block`` touches.

    ``size: even`` divides the width among the ``edited`` blocks, and ``shift`` then goes by the
    place among them.

    Raises:
        ConfigError: a span outside the width, or overlapping spans.
    """
    if part is None:
        return slice(0, width)
    if isinstance(part, PartSettings):
        even = part.size == "even"
        share = 1 / max(len(edited), 1) if even else part.size
        size = _entries(share, width, "part.size", 1, ", or even")
        start = _entries(part.start, width, "part.start", 0)
        if part.shift:
            start += size * (edited.index(block) if even and edited else block)
        return _index([(start + offset) % width for offset in range(size)])
    allowed = f"null, [j, p] with 0 <= j < p <= {width}, a list of those, or {{size, start, shift}}"
    entries: list[int] = []
    for span in [part] if isinstance(part[0], int) else part:
        first, end = span
        if not 0 <= first < end <= width:
            raise ConfigError("part", f"{span!r} lies outside the width {width}", allowed)
        entries.extend(range(first, end))
    if len(set(entries)) != len(entries):
        raise ConfigError("part", "the spans overlap", allowed)
    return _index(entries)


def _entries(value: int | float | str, width: int, where: str, least: int, more: str = "") -> int:
    """A number of entries, or a share of the width, as a number from ``least``."""
    count, most = value, width - 1 + least
    if isinstance(value, float) and 0 <= value <= 1 and (value or not least):
        count = max(least, round(value * width))
    if not isinstance(count, int) or not least <= count <= most:
        allowed = f"{least} to {most}, or a share of the width like 0.25{more}"
        raise ConfigError(where, f"{value!r} does not fit", allowed)
    return count


@dataclass(frozen=True)
class Placement:
    """One site's edit fitted to one encoder.

    Attributes:
        blocks: indices of the edited blocks, ascending; ``[0]`` for a site outside the blocks.
        tokens: token positions, the same in every block; None if the site has none.
        parts: entries of the width, by block.
        width: number of entries the function sees.
        copies: number of independent edits in a block; None if the tokens share one.
    """

    blocks: list[int]
    tokens: Index | None
    parts: dict[int, Index]
    width: int
    copies: int | None

    @classmethod
    def fit(
        cls,
        config: InterventionConfig,
        *,
        width: int,
        num_blocks: int,
        num_tokens: int,
        prefix_tokens: int = 1,
        site: Site = SITES["block"],
    ) -> Placement:
        """The placement in an encoder of these sizes.

        Raises:
            ConfigError: what does not exist there, or a rank beyond the width of the part.
        """
        blocks = resolve_blocks(config.blocks, num_blocks) if site.in_blocks else [0]
        tokens = None
        if site.has_tokens:
            tokens = resolve_tokens(config.tokens, num_tokens, prefix_tokens)
        parts = {block: resolve_part(config.part, width, block, blocks) for block in blocks}
        chosen = _length(parts[blocks[0]])
        if config.rank > chosen:
            problem = f"{config.rank} does not fit vectors of width {chosen}"
            raise ConfigError("rank", problem, f"1 to {chosen}")
        copies = None if config.share_tokens or tokens is None else _length(tokens)
        return cls(blocks, tokens, parts, chosen, copies)

    @property
    def class_token_only(self) -> bool:
        """Whether no other token is read or written."""
        return isinstance(self.tokens, slice) and self.tokens == slice(0, 1)

    def apply(self, z: Tensor, block: int, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """z with the chosen entries replaced by their edited values; z itself is left alone.

        Args:
            z: (batch, tokens, width), or (batch, width) at a site without tokens.
            block: which block's part to take.
            edit: maps (batch, chosen tokens, chosen width) to the same shape.
        """
        part = self.parts[block]
        rows = z.unsqueeze(1) if self.tokens is None else take(z, 1, self.tokens)
        edited = replace(rows, 2, part, edit(take(rows, 2, part)))
        return edited.squeeze(1) if self.tokens is None else replace(z, 1, self.tokens, edited)


def take(z: Tensor, dim: int, index: Index) -> Tensor:
    """The entries at some places of a dimension; places beyond its end are left out."""
    if isinstance(index, slice):
        return z.narrow(dim, index.start, min(index.stop, z.shape[dim]) - index.start)
    return z.index_select(dim, index.to(z.device))


def replace(z: Tensor, dim: int, index: Index, values: Tensor) -> Tensor:
    """z with other entries at some places of a dimension."""
    if not isinstance(index, slice):
        return z.index_copy(dim, index.to(z.device), values)
    stop = min(index.stop, z.shape[dim])
    parts = z.narrow(dim, 0, index.start), values, z.narrow(dim, stop, z.shape[dim] - stop)
    present = [part for part in parts if part.shape[dim]]
    return torch.cat(present, dim) if len(present) > 1 else values


def _positions(values: Sequence[int], size: int, where: str, noun: str, allowed: str) -> list[int]:
    for value in values:
        if not 0 <= value < size:
            raise ConfigError(where, f"there is no {noun} {value!r}", allowed)
    if len(set(values)) != len(values):
        raise ConfigError(where, f"a {noun} is named twice", allowed)
    return sorted(values)


def _index(entries: list[int]) -> Index:
    if entries == list(range(entries[0], entries[-1] + 1)):
        return slice(entries[0], entries[-1] + 1)
    return torch.tensor(entries)


def _length(index: Index) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)
