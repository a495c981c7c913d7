"""Settings of a solution in closed form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..images import RepairSettings
from ..settings import whole

_MOST = 10**12
_RANKS = Annotated[str, Field(pattern=r"^rank_[1-9]\d{0,5}$")]
_ALLOWED = f"null, or a whole number, 1 to {_MOST}, or rank_R: as many as rank R at every place"


class SolveSettings(RepairSettings):
    """What ``solve`` takes.

    Args:
        budget: extra parameters over all tasks, given out as ranks where they help most; for
            ``init: regression``. ``rank_4``: as many as rank 4 takes at every place, on any
            encoder.
            Null: every edit has the ``rank`` of its site.
    """

    budget: Annotated[
        Annotated[int, whole(1, _MOST)] | _RANKS | None, Field(description=_ALLOWED)
    ] = None
