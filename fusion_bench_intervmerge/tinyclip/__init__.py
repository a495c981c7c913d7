"""Small real CLIPs with eight experts each, unpacked offline, without FusionBench."""

from .pools import MINI, POOLS, TINY, Pool, ensure_pool

__all__ = ["MINI", "POOLS", "TINY", "Pool", "ensure_pool"]
