"""Everything that imports fusion_bench: the algorithm, the pools, the embedded pool."""

from .algorithm import IntervMergeAlgorithm

__all__ = ["IntervMergeAlgorithm"]
