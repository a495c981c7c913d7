"""Where an edit acts: which blocks, which token positions, which slice of the width.

Everything is worked out once from the encoder's own sizes; at run time an edit is a view of the
site's tensor, a function, and a new tensor with the edited vectors in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .config import InterventionConfig
from .sites import SITES, Site

Index = slice | Tensor


def resolve_blocks(blocks: str | Sequence[int], num_blocks: int, where: str) -> list[int]:
    """Block indices, ascending, that ``blocks`` names in an encoder of ``num_blocks``.

    Raises:
        ConfigError: an unknown pattern or a block that does not exist.
    """
    patterns = "all, every_n, first_n, middle_n, last_n or a list of indices"
    allowed = f"{patterns}, for {num_blocks} blocks (0 to {num_blocks - 1})"
    if isinstance(blocks, str):
        if blocks == "all":
            return list(range(num_blocks))
        match = re.fullmatch(r"(every|first|middle|last)_(\d+)", blocks)
        if not match or not 1 <= int(match[2]) <= num_blocks:
            raise ConfigError(where, f"{blocks!r} names no blocks", allowed)
        count = int(match[2])
        if match[1] == "every":
            return list(range(0, num_blocks, count))
        start = {"first": 0, "middle": (num_blocks - count) // 2, "last": num_blocks - count}[
            match[1]
        ]
        return list(range(start, start + count))
    return _positions(blocks, num_blocks, where, "block", allowed)


def resolve_tokens(
    tokens: str | Sequence[int], num_tokens: int, where: str, prefix_tokens: int = 1
) -> Index:
    """Token positions as a slice where they are contiguous, else as an index tensor.

    Args:
        tokens: as in ``InterventionConfig``.
        num_tokens: of the encoder.
        where: the config key, for errors.
        prefix_tokens: how many stand before the patches: the class token, and registers behind it.

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
    if isinstance(tokens, str):
        if tokens not in named:
            raise ConfigError(where, f"{tokens!r} names no tokens", allowed)
        return named[tokens]
    return _index(_positions(tokens, num_tokens, where, "token position", allowed))


def resolve_part(
    part: object, width: int, block: int, where: str, edited: Sequence[int] = ()
) -> Index:
    """Entries of the width that an edit in ``block`` touches.

    Args:
        part: as in ``InterventionConfig``.
        width: of the site.
        block: index of the block.
        where: the config key, for errors.
        edited: the blocks with an edit, ``block`` among them. ``size: even`` divides the width
            among them, and ``shift`` then goes by the place among them.

    Raises:
        ConfigError: a span outside the width, overlapping spans, or a malformed part.
    """
    allowed = f"null, [j, p] with 0 <= j < p <= {width}, a list of those, or {{size, start, shift}}"
    if part is None:
        return slice(0, width)
    if isinstance(part, Mapping):
        even = part.get("size") == "even"
        share = 1 / max(len(edited), 1) if even else part.get("size")
        size: Any = _entries(share, width, at_least=1)
        start: Any = _entries(part.get("start", 0), width, at_least=0)
        if not _is_int(size) or not 1 <= size <= width:
            allowed = f"1 to {width}, a share of the width like 0.25, or even"
            raise ConfigError(f"{where}.size", f"{part.get('size')!r} does not fit", allowed)
        if not _is_int(start) or not 0 <= start < width:
            allowed = f"0 to {width - 1}, or a share of the width like 0.25"
            raise ConfigError(f"{where}.start", f"{part.get('start')!r} does not fit", allowed)
        place = edited.index(block) if even and edited else block
        start += place * size if part.get("shift", False) else 0
        return _index([(start + offset) % width for offset in range(size)])
    if not isinstance(part, Sequence) or isinstance(part, str) or not part:
        raise ConfigError(where, f"{part!r} is no part", allowed)
    spans = [part] if _is_int(part[0]) else part
    entries: list[int] = []
    for span in spans:
        if (
            not isinstance(span, Sequence)
            or len(span) != 2
            or not all(map(_is_int, span))
            or not 0 <= span[0] < span[1] <= width
        ):
            raise ConfigError(where, f"{span!r} lies outside the width {width}", allowed)
        entries.extend(range(*span))
    if len(set(entries)) != len(entries):
        raise ConfigError(where, "the spans overlap", allowed)
    return _index(entries)


@dataclass(frozen=True)
class Placement:
    """One site's edit fitted to one encoder.

    Attributes:
        blocks: indices of the edited blocks, ascending; ``[0]`` for a site that is in none.
        tokens: token positions, the same in every block; None where the site has none.
        parts: entries of the width, by block.
        width: number of entries the function sees.
        copies: number of independent edits in a block, None when the tokens share one.
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
        where: str = "interventions",
    ) -> Placement:
        """Work out the placement in an encoder of these sizes.

        Raises:
            ConfigError: blocks, tokens or a part that do not exist there.
        """
        blocks, tokens = [0], None
        if site.in_blocks:
            blocks = resolve_blocks(config.blocks, num_blocks, f"{where}.blocks")
        if site.has_tokens:
            at = f"{where}.tokens"
            tokens = resolve_tokens(config.tokens, num_tokens, at, prefix_tokens)
        parts = {b: resolve_part(config.part, width, b, f"{where}.part", blocks) for b in blocks}
        return cls(
            blocks=blocks,
            tokens=tokens,
            parts=parts,
            width=_length(parts[blocks[0]]),
            copies=None if config.share_tokens or tokens is None else _length(tokens),
        )

    @property
    def class_token_only(self) -> bool:
        """Whether no other token is read or written."""
        return isinstance(self.tokens, slice) and self.tokens == slice(0, 1)

    def apply(self, z: Tensor, block: int, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """z with the chosen entries replaced by their edited values; z itself is left alone.

        Args:
            z: (batch, tokens, width), or (batch, width) where the site has no tokens.
            block: which block's part to take.
            edit: maps (batch, chosen tokens, chosen width) to the same shape.
        """
        if self.tokens is None:
            return self._in_part(z.unsqueeze(1), block, edit).squeeze(1)
        rows = self._in_part(take(z, 1, self.tokens), block, edit)
        return replace(z, 1, self.tokens, rows)

    def _in_part(self, z: Tensor, block: int, edit: Callable[[Tensor], Tensor]) -> Tensor:
        return replace(z, 2, self.parts[block], edit(take(z, 2, self.parts[block])))


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
    kept = [part for part in parts if part.shape[dim]]
    return torch.cat(kept, dim) if len(kept) > 1 else values


def _positions(values: Sequence[int], size: int, where: str, noun: str, allowed: str) -> list[int]:
    if not isinstance(values, Sequence) or not values:
        raise ConfigError(where, f"{values!r} names no {noun}", allowed)
    for value in values:
        if not _is_int(value) or not 0 <= value < size:
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


def _entries(value: object, width: int, at_least: int) -> object:
    """A share of the width as a number of entries; anything else as it is."""
    if isinstance(value, float) and (value > 0 if at_least else value >= 0) and value <= 1:
        return max(at_least, round(value * width))
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
