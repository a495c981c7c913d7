"""A budget of extra parameters, given out rank by rank to where each buys most."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from ..errors import ConfigError

Place = TypeVar("Place", bound=Hashable)


def allocate(
    gains: Mapping[Place, Sequence[float]], costs: Mapping[Place, int], budget: int
) -> dict[Place, int]:
    """Ranks by place: the greedy choice of the largest gain a number, until nothing more fits.

    Gains fall from rank to rank, so at equal costs no other choice within the budget gains more.

    Args:
        gains: place -> what its first, second, ... rank gains; it ends at the first that gains
            nothing.
        costs: place -> numbers a rank takes.
        budget: numbers that may be spent.

    Returns:
        Place -> its rank, zero allowed; the ranks' numbers never exceed the budget.

    Raises:
        ConfigError: the budget buys not one rank.
    """
    if budget < min(costs.values()):
        allowed = f"{min(costs.values())} or more, the numbers of one rank"
        raise ConfigError("budget", f"{budget} numbers buy not one rank", allowed)
    ranks = dict.fromkeys(gains, 0)
    order = {place: index for index, place in enumerate(gains)}  # decides between equal gains
    waiting = [(-g[0] / costs[p], order[p], p) for p, g in gains.items() if len(g) and g[0] > 0]
    heapq.heapify(waiting)
    while waiting:
        _, index, place = heapq.heappop(waiting)
        if costs[place] > budget:
            continue
        budget -= costs[place]
        ranks[place] += 1
        rest = gains[place][ranks[place] :]
        if len(rest) and rest[0] > 0:
            heapq.heappush(waiting, (-rest[0] / costs[place], index, place))
    return ranks
