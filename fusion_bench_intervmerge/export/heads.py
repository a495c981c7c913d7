"""Zero-shot heads: class names turned into the matrix that gives logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

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
