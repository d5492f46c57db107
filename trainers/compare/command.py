"""`lowrank compare` from what was asked for to a folder with results."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from ..config_io import merge
from ..data import data_fingerprint
from ..data.config import DataConfig
from ..loop import TrainingError
from ..official import missing
from ..preset import read_preset
from . import tables, tuning
from .entries import Entry, parse_methods
from .estimate import estimate, show
from .memory import held, predicted, rank_for
from .plan import Run, make_run, own_schedule, steps_of
from .pool import Outcome, Pool, open_pool, outcome
from .results import Results, make_rows
from .setting import Setting, joined, read_setting, versions, write_setting


@dataclass(frozen=True)
class Asked:
    """What was asked for; None takes what the folder has, or the default.

    Attributes:
        output: the comparison's folder.
        methods: a list for `parse_methods`.
        seeds: of weights and data order.
        model: a preset's name.
        data: "stdlib", "c4" or a folder.
        steps: of a run; the preset's by default.
        settings: further settings of all runs, a layer of the configuration.
        equal: "steps", "tokens" or "memory".
        tune: search the grid first.
        tuning_seed: of the tuning runs.
        rates: where settings found before are.
        jobs: runs at a time.
        keep_checkpoints: whether finished runs keep their last checkpoint.
        dry_run: estimate the time alone.
    """

    output: Path
    methods: str | None = None
    seeds: tuple[int, ...] | None = None
    model: str | None = None
    data: str | None = None
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    equal: str | None = None
    tune: bool | None = None
    tuning_seed: int | None = None
    rates: Path | None = None
    jobs: int = 1
    keep_checkpoints: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """A comparison, checked and ready to run.

    Attributes:
        setting: what all runs have in common.
        entries: the methods that can be had here.
        skipped: label and reason of the others.
        ranks: chosen for equal memory, by label.
        remarks: what a reader must know, by label.
        predictions: bytes by category, by label.
    """

    setting: Setting
    entries: tuple[Entry, ...]
    skipped: Mapping[str, str]
    ranks: Mapping[str, int]
    remarks: Mapping[str, Sequence[str]]
    predictions: Mapping[str, Mapping[str, int]]

    def run(self, entry: Entry, seed: int, choice: Mapping[str, Any]) -> Run:
        """The run of a method with options of its optimizer."""
        steps = steps_of(self.setting, entry, self.entries[0])
        rank = self.ranks.get(entry.label)
        last = {} if rank is None else {"rank": rank}
        return make_run(self.setting, entry, seed, choice, steps=steps, last=last)

    def runs(self, rates: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Run]]:
        """The table's runs by label."""
        return {
            entry.label: [
                self.run(entry, seed, rates.get(entry.label, {})) for seed in self.setting.seeds
            ]
            for entry in self.entries
        }


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
    if asked.dry_run:
        found = estimate(
            setting, plan.runs(setting.rates), asked.output, asked.jobs, _sayer(console)
        )
        show(found, asked.jobs, console)
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    with _hold(asked.output), _ended_by_signals():
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
    _say(console, f"report: {asked.output / 'report.html'}")
    if results.failed:
        key, message = next(iter(results.failed.items()))
        raise TrainingError(
            f"{len(results.failed)} run(s) ended with an error, {key}: {message}; the others are"
            " kept, and the same command tries these again"
        )


def report(folder: Path) -> Path:
    """Writes the results of a comparison from what its folder holds now.

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
    runs = plan.runs(rates)
    done = known([run for own in runs.values() for run in own])
    write_results(_results(plan, runs, done, {}, rates), folder)
    return folder / "report.html"


def write_results(results: Results, folder: Path) -> None:
    """Writes results.csv, results.json and report.html."""
    from ..report.compare_page import write_compare_report

    tables.write_tables(results, folder)
    write_compare_report(results, folder)


def decide(asked: Asked) -> Setting:
    """The setting: what is asked for over what the folder has over the defaults.

    Raises:
        ValueError: something is wrong, or isn't what the folder holds.
    """
    former = read_setting(asked.output)
    base = former or Setting(methods=("adamw",), seeds=(0, 1, 2))
    model = asked.model or base.model
    preset = read_preset(model)
    steps = asked.steps if asked.steps is not None else None
    if steps is None:
        steps = former.steps if former else int(preset["train"]["steps"])
    if asked.methods is None and former is None:
        raise ValueError("--methods is not given; accepted: names, `lowrank methods` lists them")
    labels = base.methods
    if asked.methods is not None:
        labels = tuple(entry.label for entry in parse_methods(asked.methods))
    settings = merge(base.settings, asked.settings)
    data = asked.data or base.data
    _refuse_own(settings)
    _refuse_inside(asked.output, data)
    text_key = dict(settings.get("data", {})).get("text_key")
    source = (
        DataConfig(source=data) if text_key is None else DataConfig(source=data, text_key=text_key)
    )
    setting = Setting(
        methods=labels,
        seeds=asked.seeds or base.seeds,
        model=model,
        data=data,
        steps=steps,
        settings=settings,
        equal=asked.equal or base.equal,
        tune=base.tune if asked.tune is None else asked.tune,
        tuning_seed=base.tuning_seed if asked.tuning_seed is None else asked.tuning_seed,
        rates=tuning.read_rates(asked.rates) if asked.rates is not None else base.rates,
        data_sha256=str(data_fingerprint(source)["sha256"]),
        versions=versions(),
    )
    return setting if former is None else joined(former, setting, asked.output)


def _refuse_own(settings: Mapping[str, Any]) -> None:
    flags = {
        ("model", "name"): "--model",
        ("data", "source"): "--data",
        ("train", "steps"): "--steps",
        ("train", "seed"): "--seeds",
        ("optimizer", "name"): "--methods",
        ("optimizer", "lr"): "--methods NAME+lr=VALUE",
    }
    for (section, key), flag in flags.items():
        if key in dict(settings.get(section, {})):
            raise ValueError(f"--set {section}.{key} in a comparison; accepted: {flag}")


def _refuse_inside(output: Path, data: str) -> None:
    source = Path(data).expanduser()
    if output.is_dir() and source.is_dir() and output.samefile(source):
        raise ValueError(f"--output {output} is the data's folder; choose another")


def prepare(setting: Setting) -> Plan:
    """Checks every run before the first begins, and predicts memory.

    Raises:
        ValueError: no method can be had, or a setting is not accepted.
    """
    every = parse_methods(",".join(setting.methods))
    reasons = {entry.label: missing(entry.optimizer) for entry in every}
    entries = tuple(entry for entry in every if reasons[entry.label] is None)
    if not entries:
        raise ValueError(f"--methods: none can be had here; {next(iter(reasons.values()))}")
    lacking = [entry.label for entry in entries if entry.label not in setting.rates]
    if setting.rates and lacking and not setting.tune:
        raise ValueError(f"--rates has nothing of {lacking[0]}; --tune finds it")
    ranks: dict[str, int] = {}
    remarks: dict[str, list[str]] = {}
    predictions: dict[str, dict[str, int]] = {}
    most: int | None = None
    for entry in entries:
        said = remarks.setdefault(entry.label, [])
        choice = setting.rates.get(entry.label, {})
        run = make_run(setting, entry, setting.seeds[0], choice)
        steps_of(setting, entry, entries[0])
        if own_schedule(setting, run) and "schedule" not in entry.settings:
            said.append(f"its own schedule: {run.config.schedule.name}")
        try:
            if setting.equal == "memory":
                if most is None:
                    most = held(run.config)
                else:
                    rank, remark = rank_for(run.config, most)
                    said += [remark] if remark else []
                    if rank is not None:
                        ranks[entry.label] = rank
                        run = make_run(
                            setting, entry, setting.seeds[0], choice, last={"rank": rank}
                        )
            predictions[entry.label] = predicted(run.config)
        except ValueError as error:
            raise ValueError(f"{entry.label}: {error}") from None
    skipped = {label: reason for label, reason in reasons.items() if reason is not None}
    return Plan(setting, entries, skipped, ranks, remarks, predictions)


def _carry_out(plan: Plan, pool: Pool, console: Console) -> Results:
    rates = _rates(plan, pool.run_all, _sayer(console))
    runs = plan.runs(rates)
    # Seed by seed, so that what is there at any time can be compared.
    ordered = [own[place] for place in range(len(plan.setting.seeds)) for own in runs.values()]
    untuned = set(runs) - set(rates) if plan.setting.tune else set()
    done = pool.run_all([run for run in ordered if run.entry.label not in untuned])
    return _results(plan, runs, done, pool.failed, rates)


def _rates(plan: Plan, run_all: Any, say: Any) -> dict[str, dict[str, Any]]:
    """The options of each method: tuned, found before, or none beside the presets'."""
    setting = plan.setting
    labels = [entry.label for entry in plan.entries]
    known = {label: dict(setting.rates[label]) for label in labels if label in setting.rates}
    if not setting.tune:
        return known

    def make(entry: Entry, options: Mapping[str, Any]) -> Run:
        return plan.run(entry, setting.tuning_seed, options)

    before = [entry for entry in plan.entries if entry.label in known]
    found = tuning.refine(before, known, make, run_all, say) if before else {}
    rest = [entry for entry in plan.entries if entry.label not in known]
    searched = tuning.tune(rest, make, run_all, say)
    return found | {label: tuning.record(one) for label, one in searched.items()}


def _results(
    plan: Plan,
    runs: Mapping[str, Sequence[Run]],
    done: Mapping[str, Outcome],
    failed: Mapping[str, str],
    rates: Mapping[str, Mapping[str, Any]],
) -> Results:
    setting = plan.setting
    absent = [
        (label, run.seed) for label, own in runs.items() for run in own if run.key not in done
    ]
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
        "grid": tuning.declared() if setting.tune else None,
        "versions": dict(setting.versions),
    }
    return Results(
        make_rows(runs, done, plan.predictions, plan.remarks),
        tuple(absent),
        plan.skipped,
        dict(failed),
        rates,
        about,
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


def _sayer(console: Console) -> Any:
    return lambda text: _say(console, text)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
