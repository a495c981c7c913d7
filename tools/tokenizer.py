"""A CLIP tokenizer whose vocabulary is the pool's own captions."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

END = "</w>"


def write_tokenizer(folder: Path, captions: Iterable[str]) -> tuple[Path, Path]:
    """Makes a byte-pair tokenizer that knows every word of the captions, in CLIP's file format.

    The vocabulary has CLIP's order: bytes, bytes that end a word, merges, start, end. So the end
    token has the highest id, and a tower that pools by the highest id (OpenCLIP) agrees with one
    that looks for the end token (Hugging Face). Text beyond the captions is spelled out.

    Args:
        folder: gets ``vocab.json`` and ``merges.txt``, which are returned.
    """
    words = sorted({w for text in captions for w in re.findall(r"[a-z]+|[0-9]", text.lower())})
    merges = _merges(words)
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + END for letter in letters), *map("".join, merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Joins the most frequent pair of neighbours until every word is one token."""
    spelled = [[*word[:-1], word[-1] + END] for word in words]
    pairs: Counter[tuple[str, str]] = Counter()
    words_with: dict[tuple[str, str], set[int]] = defaultdict(set)
    for i, tokens in enumerate(spelled):
        for pair in pairwise(tokens):
            pairs[pair] += 1
            words_with[pair].add(i)
    merges: list[tuple[str, str]] = []
    while pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for i in words_with[best]:  # some of which have lost it since
            for pair in pairwise(spelled[i]):
                pairs[pair] -= 1
                if not pairs[pair]:
                    del pairs[pair]
            spelled[i] = _join(spelled[i], best)
            for pair in pairwise(spelled[i]):
                pairs[pair] += 1
                if pair != best:
                    words_with[pair].add(i)
    return merges


def _join(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for token in tokens:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined
