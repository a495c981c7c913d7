"""Small real CLIPs with eight experts each, made and kept offline, without FusionBench."""

from .build import ensure_pool
from .pools import MINI, POOLS, TINY, Pool

__all__ = ["MINI", "POOLS", "TINY", "Pool", "ensure_pool"]
