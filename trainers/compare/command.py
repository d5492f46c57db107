"""`lowrank compare` from what was asked for to a folder with results."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from ..loop import TrainingError
from . import tables
from .decide import Asked, decide, remarks
from .entries import Entry
from .estimate import estimate, show
from .plan import Run
from .pool import Outcome, Pool, Say, open_pool, outcome
from .prepare import Plan, prepare, with_memory
from .refining import as_trained, refine
from .results import Results, make_rows
from .search import RunAll
from .setting import read_setting, write_setting
from .tuning import declared, tune


class Ended(KeyboardInterrupt):
    """SIGTERM came."""

    status = 143


def compare(asked: Asked, console: Console) -> None:
    """Runs what is missing of a comparison and writes its results.

    Raises:
        ValueError: something asked for is wrong, or isn't what the folder holds.
        TrainingError: runs ended with an error; all others are kept.
    """
    if asked.jobs < 1:
        raise ValueError(f"--jobs is {asked.jobs}; accepted: 1 or more")
    setting = decide(asked)
    plan = prepare(setting)
    for label, reason in plan.skipped.items():
        _say(console, f"{label} is left out: {reason}")
    for line in remarks(asked, setting):
        _say(console, line)
    if asked.dry_run:
        runs = plan.runs(setting.rates)
        found = estimate(setting, runs, asked.output, asked.jobs, _sayer(console))
        show(found, asked.jobs, console)
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    with _hold(asked.output), _ended_by_signals():
        # Another comparison may have written to the folder before it was held.
        now = decide(asked)
        if now != setting:
            setting, plan = now, prepare(now)
        write_setting(setting, asked.output)
        with open_pool(asked.output, asked.jobs, _sayer(console), asked.keep_checkpoints) as pool:
            try:
                results = _carry_out(plan, pool, console)
            except KeyboardInterrupt as end:
                pool.close()
                raise type(end)(
                    f"interrupted; go on with: lowrank compare --output {asked.output}"
                ) from None
        write_results(results, asked.output)
    console.print(tables.markdown(results), markup=False, highlight=False, soft_wrap=True)
    for label, reason in results.untuned.items():
        _say(console, f"{label} has no row: {reason}")
    _say(console, f"report: {asked.output / 'report.html'}")
    if results.failed:
        key, message = next(iter(results.failed.items()))
        raise TrainingError(
            f"{len(results.failed)} run(s) ended with an error, {key}: {message}; the others are"
            " kept, and the same command tries these again"
        )


def report(folder: Path, console: Console) -> Path:
    """Writes the results of a comparison from what its folder holds now.

    Args:
        folder: the comparison's.
        console: told which methods have no row yet.

    Returns:
        The report's path.

    Raises:
        ValueError: the folder is no comparison's.
    """
    setting = read_setting(folder)
    if setting is None:
        raise ValueError(f"{folder} holds no comparison")
    plan = prepare(setting)

    def known(runs: Sequence[Run]) -> dict[str, Outcome]:
        found = {run.key: outcome(folder, run) for run in runs}
        return {key: one for key, one in found.items() if one is not None}

    rates = _rates(plan, known, lambda _: None)
    plan, runs = _final(plan, rates)
    done = known([run for own in runs.values() for run in own])
    results = _results(plan, runs, done, {}, rates)
    for label, reason in results.untuned.items():
        _say(console, f"{label} has no row: {reason}")
    write_results(results, folder)
    return folder / "report.html"


def write_results(results: Results, folder: Path) -> None:
    """Writes results.csv, results.json and report.html."""
    from ..report.compare_page import write_compare_report

    tables.write_tables(results, folder)
    write_compare_report(results, folder)


def _carry_out(plan: Plan, pool: Pool, console: Console) -> Results:
    rates = _rates(plan, pool.run_all, _sayer(console))
    plan, runs = _final(plan, rates)
    # Seed by seed, so that what is there at any time can be compared.
    places = range(len(plan.setting.seeds))
    done = pool.run_all([own[place] for place in places for own in runs.values() if own])
    return _results(plan, runs, done, pool.failed, rates)


def _final(plan: Plan, rates: Mapping[str, Mapping[str, Any]]) -> tuple[Plan, dict[str, list[Run]]]:
    """The plan with the rates that were found, and the table's runs; none of untuned methods."""
    if not plan.setting.tune:
        return plan, plan.runs(rates)
    plan = with_memory(plan, rates)
    return plan, {label: own if label in rates else [] for label, own in plan.runs(rates).items()}


def _rates(plan: Plan, run_all: RunAll, say: Say) -> dict[str, dict[str, Any]]:
    """The options of each method: tuned, found before, or none beside the presets'.

    A method of which a tuning run has no outcome has none.
    """
    setting = plan.setting
    known = {
        entry.label: as_trained(entry, setting.rates[entry.label])
        for entry in plan.entries
        if entry.label in setting.rates
    }
    if not setting.tune:
        return known

    def make(entry: Entry, options: Mapping[str, Any]) -> Run:
        return plan.run(entry, setting.tuning_seed, options)

    before = [entry for entry in plan.entries if entry.label in known]
    found = refine(before, known, make, run_all, say) if before else {}
    rest = [entry for entry in plan.entries if entry.label not in known]
    return found | tune(rest, make, run_all, say, setting.tune_apart)


def _results(
    plan: Plan,
    runs: Mapping[str, Sequence[Run]],
    done: Mapping[str, Outcome],
    failed: Mapping[str, str],
    rates: Mapping[str, Mapping[str, Any]],
) -> Results:
    setting = plan.setting
    every = [(label, run) for label, own in runs.items() for run in own]
    absent = [(label, run.seed) for label, run in every if run.key not in done]
    untuned = {
        label: "its tuning isn't finished; the same command goes on with it"
        for label, own in runs.items()
        if not own
    }
    about = {
        "model": setting.model,
        "data": Path(setting.data).name or setting.data,
        "data_sha256": setting.data_sha256,
        "steps": setting.steps,
        "seeds": list(setting.seeds),
        "equal": setting.equal,
        "settings": dict(setting.settings),
        "tuned": setting.tune,
        "tuning_seed": setting.tuning_seed if setting.tune else None,
        "grid": declared(setting.tune_apart) if setting.tune else None,
        "versions": dict(setting.versions),
    }
    return Results(
        make_rows(runs, done, plan.predictions, plan.remarks),
        tuple(absent),
        plan.skipped,
        dict(failed),
        rates,
        about,
        untuned,
    )


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Holds the folder, so that two comparisons never write into it; ends with the process."""
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another comparison") from None
        yield


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the comparison as Ctrl-C does; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sayer(console: Console) -> Say:
    return lambda text: _say(console, text)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
