"""stub"""

from __future__ import annotations


def write_compare_report(results, folder):
    pass
