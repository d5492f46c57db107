"""The command line of `./scripts/benchmark`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .contestants import GALORE_TORCH
from .measure import BENCHMARKS, ROUNDS
from .results import write
from .timing import disturbed
from .workload import Workload


def parser() -> argparse.ArgumentParser:
    """The grammar."""
    made = argparse.ArgumentParser(
        prog="./scripts/benchmark",
        description="Times the optimizers' own work on the projected matrices of llama_60m.",
        allow_abbrev=False,
    )
    made.add_argument("what", choices=[*BENCHMARKS, "all"], help="which benchmark")
    made.add_argument("--rounds", type=int, metavar="N", help=f"rounds; default {ROUNDS}")
    made.add_argument("--threads", type=int, default=2, metavar="N", help="of torch; default 2")
    made.add_argument("--rank", type=int, default=128, metavar="R", help="default 128")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="write JSON there as well")
    return made


def main(arguments: Sequence[str]) -> int:
    """Runs what is asked for; returns the exit status."""
    options = parser().parse_args(arguments)
    console, notes = Console(), Console(stderr=True)
    command = shlex.join(["./scripts/benchmark", *arguments])
    try:
        for option, value in (("--rounds", options.rounds), ("--threads", options.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{option} is {value}; it must be 1 or more")
        work = Workload(rank=options.rank)
        torch.set_num_threads(options.threads)
        for name in BENCHMARKS if options.what == "all" else (options.what,):
            with notes.status(name) as status:
                result = BENCHMARKS[name](work, options.rounds or ROUNDS[name], status.update)
            console.print(result.table())
            if disturbed(result.canaries):
                notes.print(
                    "the machine was busy with other work (see the canary): these times are not "
                    "to be relied on; run it again on a quiet machine",
                    soft_wrap=True,
                )
            if name in ("step", "refresh") and GALORE_TORCH not in result.samples:
                notes.print("galore-torch is not installed: there is nothing to compare with")
            if options.output is not None:
                console.print(f"written: {write(result, options.output, command)}", soft_wrap=True)
    except (ValueError, OSError) as error:
        notes.print(f"benchmark: {error}", markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
