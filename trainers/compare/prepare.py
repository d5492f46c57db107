"""Checks of a comparison before its first run, and its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..official import missing
from ..preset import canonical
from .entries import Entry, parse_methods
from .memory import held, predicted, rank_for
from .plan import Run, make_run, own_schedule, steps_of
from .setting import Setting


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


def prepare(setting: Setting) -> Plan:
    """Checks every run before the first begins, and predicts memory from what is known then.

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
    if setting.equal == "memory":
        _refuse_ranks(entries[1:])
    skipped = {label: reason for label, reason in reasons.items() if reason is not None}
    return with_memory(Plan(setting, entries, skipped, {}, {}, {}), setting.rates)


def _refuse_ranks(entries: Sequence[Entry]) -> None:
    """Refuses a rank of an entry's own where ranks are chosen."""
    for entry in entries:
        given = canonical(entry.settings, entry.optimizer).get("optimizer", {})
        if "rank" in given:
            raise ValueError(
                f"--equal memory with {entry.label}: its rank is chosen by the first method's"
                " memory; leave rank away, or use --equal steps"
            )


def with_memory(plan: Plan, rates: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with ranks, remarks and predictions of the settings that the table's runs get.

    The rule of embeddings and head changes a method's memory, so that what tuning finds changes the
    rank with which a method takes as much as the first one.

    Args:
        plan: the comparison; where it has ranks, tuning ran with them.
        rates: optimizer settings by label.

    Raises:
        ValueError: a setting is not accepted.
    """
    setting, entries = plan.setting, plan.entries
    ranks: dict[str, int] = {}
    remarks: dict[str, list[str]] = {}
    predictions: dict[str, dict[str, int]] = {}
    most: int | None = None
    for entry in entries:
        said = remarks.setdefault(entry.label, [])
        choice = rates.get(entry.label, {})
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
                        before = plan.ranks.get(entry.label, rank)
                        said += [f"tuned at rank {before}"] if before != rank else []
                        run = make_run(
                            setting, entry, setting.seeds[0], choice, last={"rank": rank}
                        )
            predictions[entry.label] = predicted(run.config)
        except ValueError as error:
            raise ValueError(f"{entry.label}: {error}") from None
    return replace(plan, ranks=ranks, remarks=remarks, predictions=predictions)
