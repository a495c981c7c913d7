"""Everything that imports fusion_bench: the algorithm, the pools, the embedded pool."""

from .algorithm import IntervMergeAlgorithm
from .analyse import AnalyseInterventionModel
from .calibrate import CalibrationAlgorithm, FeatCalAlgorithm
from .comparison import ComparisonAlgorithm
from .load import LoadInterventionModel

__all__ = [
    "AnalyseInterventionModel",
    "CalibrationAlgorithm",
    "ComparisonAlgorithm",
    "FeatCalAlgorithm",
    "IntervMergeAlgorithm",
    "LoadInterventionModel",
]
