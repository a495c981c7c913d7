"""The published optimizer, for runs that follow the published code to the letter."""

from __future__ import annotations

from typing import Any

import torch


class ThriceAdam(torch.optim.Adam):
    """Adam that takes each of its steps three times, on the same gradients.

    The published code lists every parameter three times in one group, and Adam goes through the
    list: moments, step count and parameter move on at each mention.
    """

    def step(self, closure: Any = None) -> Any:
        """Three steps of Adam; ``closure`` is evaluated once, before the first."""
        loss = super().step(closure)
        for _ in range(2):
            super().step()
        return loss
