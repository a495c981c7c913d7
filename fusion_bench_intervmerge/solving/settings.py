"""Settings of a solution in closed form."""

from __future__ import annotations

from typing import Annotated

from ..images import RepairSettings
from ..settings import whole


class SolveSettings(RepairSettings):
    """What ``solve`` takes.

    Args:
        budget: extra parameters over all tasks, given out as ranks where they help most; for
            ``init: regression``. Null: every edit has the ``rank`` of its site.
    """

    budget: Annotated[int | None, whole(1, 10**12, before="null, or ")] = None
