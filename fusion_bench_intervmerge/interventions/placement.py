"""Where an edit acts: which blocks, which token positions, which slice of the width.

Everything is worked out once from the encoder's own sizes; at run time an edit is a view of the
site's tensor, a function, and a write back.
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


def resolve_tokens(tokens: str | Sequence[int], num_tokens: int, where: str) -> Index:
    """Token positions as a slice where they are contiguous, else as an index tensor.

    Raises:
        ConfigError: an unknown name or a position that does not exist.
    """
    patches = num_tokens - 1
    named = {
        "class": slice(0, 1),
        "first": slice(1, 2),
        "middle": slice((1 + patches) // 2, (1 + patches) // 2 + 1),
        "last": slice(patches, patches + 1),
        "patch": slice(1, num_tokens),
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
        for key in part:
            if key not in ("size", "start", "shift"):
                raise ConfigError(f"{where}.{key}", "no such setting", "size, start, shift")
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
        blocks: indices of the edited blocks, ascending; ``[0]`` stands for the site ``output``.
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
        output: bool = False,
        where: str = "interventions",
    ) -> Placement:
        """Work out the placement in an encoder of these sizes.

        Raises:
            ConfigError: blocks, tokens or a part that do not exist there.
        """
        if output:
            blocks: list[int] = [0]
            tokens = None
        else:
            blocks = resolve_blocks(config.blocks, num_blocks, f"{where}.blocks")
            tokens = resolve_tokens(config.tokens, num_tokens, f"{where}.tokens")
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
        """Replace the chosen entries of z by their edited values.

        z is written in place: it is the fresh output of a module that nothing else holds, and a
        copy of every site's tensor would cost more than the edit.

        Args:
            z: (batch, tokens, width), or (batch, width) at the site ``output``.
            block: which block's part to take.
            edit: maps (batch, chosen tokens, chosen width) to the same shape.
        """
        part = self.parts[block]
        if self.tokens is None:
            where: tuple[Index, ...] = (slice(None), part)
            z[where] = edit(z[where].clone().unsqueeze(1)).squeeze(1)
            return z
        if isinstance(self.tokens, Tensor) and isinstance(part, Tensor):
            where = (slice(None), self.tokens.unsqueeze(1), part)
        else:
            where = (slice(None), self.tokens, part)
        # Autograd keeps what the edit read, and what it read is about to be overwritten.
        z[where] = edit(z[where].clone())
        return z


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
