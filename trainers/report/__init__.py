"""Turns a run's folder into one HTML page that needs nothing but a browser."""

from .comparison import write_comparison
from .runs import Run, RunFolderError, read_run
from .write import write_report

__all__ = [
    "Run",
    "RunFolderError",
    "read_run",
    "write_comparison",
    "write_report",
]
