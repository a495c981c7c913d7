"""Tables, figures and one HTML page from finished runs.

Reads what runs wrote and imports neither fusion_bench nor torch, so that a report is made in
seconds, and where no toolkit is installed.
"""

from .page import write_report
from .runs import Evaluation, Row, Run, gather, read_run

__all__ = ["Evaluation", "Row", "Run", "gather", "read_run", "write_report"]
