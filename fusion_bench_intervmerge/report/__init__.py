"""Tables, figures and one HTML page from finished runs.

Imports neither fusion_bench nor torch, so that a report takes seconds, and no toolkit.
"""

from .page import write_report, write_study
from .runs import Evaluation, Row, Run, gather, read_run

__all__ = ["Evaluation", "Row", "Run", "gather", "read_run", "write_report", "write_study"]
