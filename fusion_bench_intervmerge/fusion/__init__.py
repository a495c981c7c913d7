"""Everything that imports fusion_bench: the algorithm, the pools, the embedded pool."""

from .algorithm import IntervMergeAlgorithm
from .comparison import ComparisonAlgorithm
from .load import LoadInterventionModel

__all__ = ["ComparisonAlgorithm", "IntervMergeAlgorithm", "LoadInterventionModel"]
