"""How long a comparison will take, from the first steps of each method."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ..units import format_duration
from .plan import Run, tokens_per_step
from .pool import Say, open_pool, outcome
from .refining import FACTORS
from .results import optimizer_times
from .setting import Setting
from .tuning import given_by, grid_of, moved_apart, neighbours

#: Steps that are measured, those at the start among them, which are left out of the median.
STEPS = 6
#: An evaluated token takes about a third of a trained one: a forward pass without a backward.
_EVALUATION = 1 / 3


@dataclass(frozen=True)
class Estimate:
    """What is left to do of one method.

    Attributes:
        label: its name.
        runs: left, tuning not counted.
        tuning: least number of tuning runs left.
        seconds: of one run, None where its steps could not be measured.
        remark: why not.
    """

    label: str
    runs: int
    tuning: int
    seconds: float | None
    remark: str = ""


def estimate(
    setting: Setting, runs: Mapping[str, Sequence[Run]], root: Path, jobs: int, say: Say
) -> list[Estimate]:
    """Measures the first steps of each method, on as many processes as the comparison would use.

    Nothing is written to the comparison's folder; steps that a run there has done are read.

    Args:
        setting: the comparison.
        runs: by label.
        root: the comparison's folder, which need not exist.
        jobs: processes.
        say: told of each measurement.
    """
    measured = {label: _known(root, own) for label, own in runs.items()}
    remarks: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lowrank-compare-") as place:
        short = {label: _short(own[0]) for label, own in runs.items() if measured[label] is None}
        with open_pool(Path(place), jobs, say) as pool:
            pool.run_all(list(short.values()))
            for label, run in short.items():
                measured[label] = _step_seconds(run.folder(Path(place)))
                remarks[label] = pool.failed.get(run.key, "")
    return [
        Estimate(
            label,
            sum(outcome(root, run) is None for run in own),
            _tuning_runs(setting, own[0]),
            _of_run(own[0], measured[label]),
            remarks.get(label, ""),
        )
        for label, own in runs.items()
    ]


def show(estimates: Sequence[Estimate], jobs: int, console: Console) -> None:
    """Prints the runs and the time that they will take."""
    total = 0.0
    unknown = [item.label for item in estimates if item.seconds is None]
    for item in estimates:
        seconds = item.seconds or 0.0
        tuning = f" and at least {item.tuning} of tuning" if item.tuning else ""
        each = "unknown" if item.seconds is None else format_duration(item.seconds)
        total += seconds * (item.runs + item.tuning)
        line = f"{item.label}: {item.runs} runs{tuning}, {each} each"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    least = "at least " if any(item.tuning for item in estimates) or unknown else "about "
    console.print(
        f"{least}{format_duration(total / jobs)} in all, {jobs} at a time; nothing was written",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _short(run: Run) -> Run:
    config = run.config
    return replace(
        run,
        config=replace(
            config,
            train=replace(config.train, steps=STEPS),
            eval=replace(config.eval, every=0, tokens=config.data.sequence_length),
        ),
    )


def _known(root: Path, runs: Sequence[Run]) -> float | None:
    found = (_step_seconds(run.folder(root)) for run in runs)
    return next((seconds for seconds in found if seconds is not None), None)


def _step_seconds(folder: Path) -> float | None:
    """Mean time of a step but the first, refreshes included."""
    steps: tuple[float, ...] = ()
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
        steps = optimizer_times(folder).steps
    if len(steps) < STEPS:
        return None
    return sum(steps[1:]) / len(steps[1:])


def _of_run(run: Run, step: float | None) -> float | None:
    if step is None:
        return None
    config = run.config
    evaluations = 2 + (config.train.steps // config.eval.every if config.eval.every else 0)
    per_token = step / tokens_per_step(config)
    return config.train.steps * step + evaluations * config.eval.tokens * per_token * _EVALUATION


def _tuning_runs(setting: Setting, run: Run) -> int:
    """The fewest runs that tuning takes: a start whose neighbours are all worse."""
    if not setting.tune:
        return 0
    if run.entry.label in setting.rates:
        return 0 if "lr" in given_by(run.entry) else len(FACTORS)
    grid = grid_of(run.entry, setting.tune_apart)
    return 1 + len(neighbours(grid.start, grid)) + len(moved_apart(grid.start, grid))
