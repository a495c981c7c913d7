"""Tables, figures and one HTML page from finished runs.

Reads what runs wrote and imports neither fusion_bench nor torch, so that a report is made in
seconds, and where no toolkit is installed.
"""

from .page import write_report
from .runs import Result, Run, Study, gather, read_run
from .tables import Row, Stat, rows

__all__ = ["Result", "Row", "Run", "Stat", "Study", "gather", "read_run", "rows", "write_report"]
