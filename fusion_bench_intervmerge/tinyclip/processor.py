"""The image processor and the tokenizer of a pool."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast

from .tasks import SIZE
from .training import MEAN, STD


def write_processor(tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Saves both, in CLIP's format."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def read_tokenizer(folder: Path, context: int) -> CLIPTokenizerFast:
    """The tokenizer of ``vocab.json`` and ``merges.txt``."""
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizerFast(vocabulary, merges, model_max_length=context)
