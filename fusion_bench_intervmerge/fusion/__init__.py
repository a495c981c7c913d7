"""Everything that imports fusion_bench: the algorithm, the pools, the embedded pool."""

from .algorithm import IntervMergeAlgorithm
from .calibrate import CalibrationAlgorithm, FeatCalAlgorithm
from .comparison import ComparisonAlgorithm
from .published import PublishedAlgorithm
from .saved import AnalyseInterventionModel, LoadInterventionModel

__all__ = [
    "AnalyseInterventionModel",
    "CalibrationAlgorithm",
    "ComparisonAlgorithm",
    "FeatCalAlgorithm",
    "IntervMergeAlgorithm",
    "LoadInterventionModel",
    "PublishedAlgorithm",
]
