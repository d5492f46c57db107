"""The search on the grid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lowrank.trainers.compare.entries import Entry, parse_methods
from lowrank.trainers.compare.plan import Run, make_run
from lowrank.trainers.compare.pool import Outcome
from lowrank.trainers.compare.setting import Setting
from lowrank.trainers.compare.tuning import (
    RATES,
    Point,
    grid_of,
    read_rates,
    record,
    refine,
    tune,
)

SETTING = Setting(methods=("adamw",), seeds=(0,), model="llama_1m", steps=40)


class Trainer:
    """Gives each run a loss from its options, and counts runs."""

    def __init__(self, best: Mapping[str, Point]) -> None:
        self.best = best
        self.seen: set[str] = set()
        self.failing: set[str] = set()

    def make(self, entry: Entry, options: Mapping[str, Any]) -> Run:
        return make_run(SETTING, entry, 100, options)

    def run_all(self, runs: Sequence[Run]) -> dict[str, Outcome]:
        self.seen |= {run.key for run in runs}
        return {
            run.key: Outcome(Path(), "", {"val_loss": self.loss(run)})
            for run in runs
            if run.entry.label not in self.failing
        }

    def loss(self, run: Run) -> float:
        best, options = self.best[run.entry.label], run.config.optimizer.options
        loss = 4.0
        for name, value in (("lr", run.config.optimizer.lr), ("plain_lr", options["plain_lr"])):
            loss += abs(RATES.index(value) - RATES.index(getattr(best, name)))
        betas = options.get("betas")
        loss += 0.5 * ((None if betas is None else tuple(betas)) != best.betas)
        return loss + 0.5 * (options.get("plain_rule", "own") != best.plain_rule)


BEST = {
    "adamw": Point(1e-3, 3e-2, (0.9, 0.95), "adafactor"),
    "galore_adamw": Point(1e-1, 1e-3, None, "adafactor"),
    "adafactor": Point(3e-2, 1e-2, None, "adamw"),
    "official:fira_adamw": Point(1e-2, 1e-2, (0.9, 0.95), "own"),
}


@pytest.mark.slow
def test_the_search_finds_each_best_point() -> None:
    trainer = Trainer(BEST)
    entries = parse_methods(",".join(BEST))
    found = tune(entries, trainer.make, trainer.run_all, lambda _: None)
    assert {label: one.point for label, one in found.items()} == BEST
    assert found["galore_adamw"].edge == ("lr",)
    assert sum(one.tried for one in found.values()) == len(trainer.seen)
    assert record(found["adamw"]) == {
        "lr": 1e-3,
        "plain_lr": 3e-2,
        "betas": [0.9, 0.95],
        "plain_rule": "adafactor",
        "val_loss": 4.0,
        "tried": found["adamw"].tried,
        "edge": [],
    }


def test_the_grid_is_what_a_method_has_and_its_entry_leaves_open() -> None:
    free, fixed, factored = parse_methods(
        "galore_adamw,adamw+lr=0.1+betas=[0.9,0.9]+plain_rule=own,galore_adafactor"
    )
    assert grid_of(free).betas == (None, (0.9, 0.95), (0.5, 0.99))
    assert grid_of(free).rules == ("own", "adamw", "adafactor")
    assert grid_of(fixed).betas == (None,)
    assert grid_of(fixed).rules == ("own",)
    assert grid_of(fixed).fixed == {"lr"}
    assert grid_of(factored).betas == (None,)
    # A method that is itself a rule has it already.
    assert grid_of(parse_methods("adamw")[0]).rules == ("own", "adafactor")


def test_a_method_whose_runs_fail_is_left_out_of_the_search() -> None:
    trainer = Trainer(BEST)
    trainer.failing = {"adamw"}
    found = tune(parse_methods("adamw,adafactor"), trainer.make, trainer.run_all, lambda _: None)
    assert set(found) == {"adafactor"}


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (0.01, [0.005, 0.01, 0.02], []),
        (0.02, [0.005, 0.01, 0.02, 0.04], []),
        (0.0025, [0.005, 0.01, 0.02, 0.0025, 0.00125], []),
        (9.0, [0.005, 0.01, 0.02, 0.04, 0.08], ["lr"]),
    ],
)
def test_rates_found_before_are_refined(
    best: float, tried: list[float], edge: list[str], tmp_path: Path
) -> None:
    (entry,) = parse_methods("galore_adamw")
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps({"rates": {"galore_adamw": {"lr": 0.01, "plain_lr": 0.03, "val_loss": 4.2}}})
    )
    rates = read_rates(tmp_path)
    assert rates == read_rates(path) == {"galore_adamw": {"lr": 0.01, "plain_lr": 0.03}}
    runs: list[float] = []

    def run_all(asked: Sequence[Run]) -> dict[str, Outcome]:
        runs.extend(run.config.optimizer.lr for run in asked)
        losses = {run.key: abs(best - run.config.optimizer.lr) for run in asked}
        return {key: Outcome(Path(), "", {"val_loss": loss}) for key, loss in losses.items()}

    found = refine([entry], rates, Trainer({}).make, run_all, lambda _: None)
    assert runs == tried
    chosen = min(tried, key=lambda lr: abs(best - lr))
    assert found["galore_adamw"] == {
        **{"lr": chosen, "plain_lr": 0.03, "val_loss": abs(best - chosen)},
        **{"tried": len(tried), "edge": edge},
    }


def test_rates_whose_runs_fail_are_left_as_far_as_they_are_known() -> None:
    (entry,) = parse_methods("galore_adamw")
    rates = {"galore_adamw": {"lr": 0.01, "plain_lr": 0.03}}

    def first_only(asked: Sequence[Run]) -> dict[str, Outcome]:
        return {asked[0].key: Outcome(Path(), "", {"val_loss": 3.0})}

    make = Trainer({}).make
    found = refine([entry], rates, make, first_only, lambda _: None)["galore_adamw"]
    assert (found["lr"], found["tried"]) == (0.005, 1)
    assert not refine([entry], rates, make, lambda _: {}, lambda _: None)


def test_files_without_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doesn't exist"):
        read_rates(tmp_path / "none.json")
    path = tmp_path / "rates.json"
    for text in ("{", "[]", '{"rows": []}', '{"rates": [1]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no rates"):
            read_rates(path)


def test_what_is_found_is_what_runs_are_made_with() -> None:
    trainer = Trainer(BEST)
    (entry,) = parse_methods("adamw")
    found = tune([entry], trainer.make, trainer.run_all, lambda _: None)["adamw"]
    made = make_run(SETTING, entry, 0, record(found)).config.optimizer
    again = make_run(SETTING, entry, 0, found.point.options()).config.optimizer
    assert made == again
    assert not {"val_loss", "tried", "edge"} & set(made.options)
