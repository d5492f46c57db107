"""The report of one run."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from .content import (
    configuration,
    environment,
    evaluation_table,
    event_table,
    footer,
    header,
    key_figures,
    measured_memory,
    notices,
)
from .figures import (
    bits_figure,
    gradient_figure,
    learning_rate_figure,
    loss_figures,
    perplexity_figure,
    throughput_figure,
)
from .html import figures, page, section
from .memory_figures import memory_bars, memory_timeline
from .runs import Run, read_run
from .subspace_figures import energy_figure, overlap_figure, refresh_figure

REPORT_NAME = "report.html"


def write_report(folder: Path) -> Path:
    """Writes a run's report: one HTML file that needs nothing but a browser.

    The run may still be going on, and the report may be written again at any time.

    Args:
        folder: A run's folder, see `read_run`.

    Returns:
        The file's path, `report.html` in the folder.

    Raises:
        RunFolderError: The folder is none of a run, or one of its files cannot be read.
        MissingExtraError: matplotlib or PyYAML is not installed.
    """
    file = folder / REPORT_NAME
    write_text(file, render_report(read_run(folder)))
    return file


def render_report(run: Run) -> str:
    """Returns the report of a run as HTML."""
    alone = [run]
    return page(
        f"{run.name}: training report",
        [
            header(run),
            notices(run),
            key_figures(run),
            section(
                "Learning",
                figures([*loss_figures(alone), perplexity_figure(alone), bits_figure(alone)]),
                evaluation_table(run),
            ),
            section(
                "Optimization",
                figures(
                    [gradient_figure(alone), learning_rate_figure(alone), throughput_figure(alone)]
                ),
            ),
            section(
                "Memory",
                figures([memory_bars(alone), memory_timeline(alone)]),
                measured_memory(run),
            ),
            section(
                "Subspaces",
                figures([energy_figure(alone), overlap_figure(alone), refresh_figure(alone)]),
            ),
            section("Events", event_table(run)),
            section("Configuration", configuration(run)),
            section("Machine and versions", environment(run)),
            footer(run),
        ],
    )
