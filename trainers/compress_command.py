"""The subcommand `lowrank compress`: a trained checkpoint with factors in place of matrices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_TEXT = """\
Cuts a checkpoint's matrices to ranks that one threshold on their singular values gives (WeLore):
those that lose half of their rank become two factors, the others stay dense.
lowrank.trainers.compressed.load(FOLDER) reads the result, with all but the factors frozen.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the command line's."""
    compress = commands.add_parser(
        "compress",
        help="factor the low-rank matrices of a checkpoint",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compress.set_defaults(run=run)
    add = compress.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, or a checkpoint's")
    add("--output", type=Path, metavar="FOLDER", required=True, help="a new or empty folder")
    budget = compress.add_mutually_exclusive_group(required=True)
    budget.add_argument("--reduction", type=float, metavar="X", help="share of ranks to remove")
    budget.add_argument("--entries", type=float, metavar="X", help="share of entries to keep")
    add("--low-rank", type=float, metavar="X", default=0.5, help="least loss of rank (0.5)")
    add("--patterns", metavar="PART", nargs="+", help="parts of names of layers (default: hidden)")


def run(options: argparse.Namespace) -> None:
    """Compresses a checkpoint and prints what became of its matrices."""
    from rich.console import Console

    from .compressed import compress, lines

    done = compress(
        options.checkpoint,
        options.output,
        reduction=options.reduction,
        entries=options.entries,
        low_rank=options.low_rank,
        patterns=options.patterns,
    )
    console = Console()
    for line in lines(done):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(str(options.output), highlight=False, markup=False, soft_wrap=True)
