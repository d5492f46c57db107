"""The command line of `./scripts/compare-methods`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowrank.optimizers.engine import checks

from . import table, tuning
from .entrants import Entrant, entrants
from .pool import Ledger, fingerprint, processes, run_all
from .run import Job
from .setting import Setting

ROOT = Path(__file__).resolve().parent.parent.parent


def parser() -> argparse.ArgumentParser:
    """The grammar."""
    made = argparse.ArgumentParser(
        prog="./scripts/compare-methods",
        description="Trains one small LLaMA with every method on equal terms.",
    )
    made.add_argument("--data", default="stdlib", help="stdlib (default) or a folder of text")
    made.add_argument("--methods", metavar="A,B", help="only these rows; default: all")
    made.add_argument("--steps", type=int, default=Setting.steps, metavar="N")
    made.add_argument("--seeds", default="0,1,2", metavar="A,B", help="default 0,1,2")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    made.add_argument("--tune", action="store_true", help="tune the learning rates first")
    made.add_argument(
        "--rates", type=Path, default=ROOT / "benchmarks" / "learning-rates.json", metavar="FILE"
    )
    made.add_argument("--ledger", type=Path, default=Path("runs/comparison.jsonl"), metavar="FILE")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="write JSON there as well")
    return made


def chosen(names: str | None) -> list[Entrant]:
    """The entrants asked for.

    Raises:
        ValueError: a name is unknown.
    """
    known = entrants()
    if names is None:
        return list(known.values())
    wanted = names.split(",")
    for name in wanted:
        if name not in known:
            raise checks.unknown_name("method", name, known)
    return [known[name] for name in wanted]


def jobs_of(
    picked: Sequence[Entrant], rates: dict[str, tuning.Rates], seeds: Sequence[int]
) -> list[Job]:
    """Every entrant with its tuned rates and each seed.

    Raises:
        ValueError: a method has no tuned rates.
    """
    jobs = []
    for entrant in picked:
        if entrant.name not in rates:
            raise ValueError(f"{entrant.name} has no tuned learning rate; --tune finds one")
        own = rates[entrant.name]
        jobs += [Job(entrant.name, own["lr"], own["plain_lr"], seed) for seed in seeds]
    return jobs


def main(arguments: Sequence[str]) -> int:
    """Runs what is asked for; returns the exit status."""
    options = parser().parse_args(arguments)
    notes = Console(stderr=True)

    def progress(text: str) -> None:
        notes.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        setting = Setting(data=options.data, steps=options.steps)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        ledger = Ledger(options.ledger, setting, fingerprint(setting))
        picked = chosen(options.methods)
        with processes(options.workers) as executor:
            if options.tune:
                families = [entrants()[e.plain] for e in picked]
                unique = {e.name: e for e in [*families, *picked]}
                tuned = tuning.tune(ledger, list(unique.values()), executor, progress)
                tuning.write_rates(options.rates, tuned, ledger)
            rates = tuning.read_rates(options.rates)
            jobs = jobs_of(picked, rates, seeds)
            records = run_all(ledger, jobs, executor, progress)
        rows = table.lines(picked, records, jobs)
        print(table.markdown(rows))
        if options.output is not None:
            command = shlex.join(["./scripts/compare-methods", *arguments])
            name = "stdlib" if options.data == "stdlib" else Path(options.data).name
            path = options.output / f"comparison-{name}.json"
            table.write(
                table.record(rows, setting, command, sum(records[job]["seconds"] for job in jobs)),
                path,
            )
            progress(f"written: {path}")
    except (ValueError, OSError) as error:
        notes.print(f"compare-methods: {error}", markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
