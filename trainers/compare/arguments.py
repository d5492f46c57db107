"""The command line of `lowrank compare`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decide import Asked

_TEXT = """\
Trains a list of methods on the same data, seeds and schedule, and leaves a folder with results.csv,
results.json and report.html. The same command, or just --output FOLDER, goes on where it stopped;
methods and seeds can be added. Embeddings, head and norms follow each method's own rule unless
+plain_rule or --tune says otherwise.
"""
_EXAMPLES = """\
examples:
  lowrank compare --methods adamw,galore_adamw,official:galore_adamw --output runs/three
  lowrank compare --methods adamw+plain_rule=adafactor,apollo_adamw+rank=64 --tune --jobs 2
  lowrank compare --methods adamw,all,official:all --model llama_1m --tune --jobs 2
  lowrank compare --methods adamw,galore_adamw --dry-run
"""


def add_compare(commands: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="train several methods on equal terms and compare them",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--methods",
        metavar="A,B,...",
        help="names, official:NAME for the official package's; each may be followed by +key=value,"
        " options of its own; the first is what the others are held against; all, official:all",
    )
    add("--model", metavar="NAME", help="llama_9m (default), llama_1m, llama_60m, 130m, ...")
    add("--data", metavar="SOURCE", help="stdlib (default), c4, or a folder of text files")
    add("--steps", metavar="N", type=int, help="optimizer steps of each run (default: the model's)")
    add("--seeds", metavar="N,N,...", help="of weights and data order (default 0,1,2)")
    add(
        "--equal",
        choices=("steps", "tokens", "memory"),
        help="what all runs have the same of: steps (default), tokens (methods with a batch of"
        " their own take more or fewer steps), memory (each rank is the largest that takes no more"
        " than the first method's weights and state; no other entry gives a rank)",
    )
    add(
        "--tune",
        action="store_true",
        default=None,
        help="search one grid of lr, plain_lr, betas and the rule of embeddings and head first, but"
        " for what an entry gives; the preset's do not count",
    )
    add(
        "--tune-embeddings",
        action="store_true",
        default=None,
        help="with --tune, search rates of embeddings and of the head of their own as well",
    )
    add("--tuning-seed", metavar="N", type=int, help="seed of the tuning runs (default 100)")
    add(
        "--rates",
        metavar="PATH",
        type=Path,
        help="settings found by an earlier comparison (its folder) or a file of rates; with --tune"
        " three points of lr around them, or up to five; the preset's plain_lr, embedding_lr,"
        " head_lr, betas and plain_rule do not count",
    )
    add("--jobs", "--workers", metavar="N", type=int, default=1, help="runs at a time (default 1)")
    add("--output", metavar="FOLDER", type=Path, help="default runs/comparison")
    add("--keep-checkpoints", action="store_true", help="keep each finished run's last checkpoint")
    add("--dry-run", action="store_true", help="print the runs and measure how long they will take")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        help="settings of all runs as section.key=value, as for pretrain",
    )
    return parser


def asked_for(options: argparse.Namespace) -> Asked:
    """What the command line asks for.

    Raises:
        ValueError: a value is not accepted.
    """
    from ..config_io import merge, parse_override
    from .decide import Asked
    from .entries import parse_seeds

    return Asked(
        output=options.output or Path("runs/comparison"),
        methods=options.methods,
        seeds=None if options.seeds is None else parse_seeds(options.seeds),
        model=options.model,
        data=options.data,
        steps=options.steps,
        settings=merge(*(parse_override(text) for text in options.overrides)),
        equal=options.equal,
        tune=options.tune,
        tune_apart=options.tune_embeddings,
        tuning_seed=options.tuning_seed,
        rates=options.rates,
        jobs=options.jobs,
        keep_checkpoints=options.keep_checkpoints,
        dry_run=options.dry_run,
    )
