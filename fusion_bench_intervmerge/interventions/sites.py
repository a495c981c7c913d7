"""Where in an encoder an edit may act. To add a site, add it to ``SITES``; nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Site:
    """A place in an encoder: the output of one of its modules.

    Attributes:
        modules: paths to that module, one for each way in which encoders name it; the first one
            that an encoder has is taken, unless the encoder's ``VisionTower.sites`` names another.
            In blocks they start at the block, which itself is ``""``; else at the tower.
        at: ``block``, one place in every block; ``start``, one place before them; ``end``, one
            behind them. Vectors of the width, one a token; at the end image features, one an image.
        closed_form: what the closed form compares with the expert's: what leaves the site's block
            (``leaves``), what enters the block plus the site's tensor (``enters``), or the image
            features (``features``). None: the site's edits can only be trained.
    """

    modules: tuple[str, ...]
    at: Literal["start", "block", "end"] = "block"
    closed_form: Literal["leaves", "enters", "features"] | None = None

    @property
    def in_blocks(self) -> bool:
        return self.at == "block"

    @property
    def has_tokens(self) -> bool:
        return self.at != "end"


# In the order in which a forward pass comes by.
SITES = {
    # self-attention output before its residual add
    "attention": Site(("self_attn", "attn"), closed_form="enters"),
    # MLP output before its residual add
    "mlp": Site(("mlp",), closed_form="leaves"),
    # block output
    "block": Site(("",), closed_form="leaves"),
    # image features after the projection
    "output": Site(("output",), at="end", closed_form="features"),
}
