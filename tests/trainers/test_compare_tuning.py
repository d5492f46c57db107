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
from lowrank.trainers.compare.refining import as_trained, read_rates, refine
from lowrank.trainers.compare.setting import Setting
from lowrank.trainers.compare.tuning import (
    BETAS,
    RATES,
    Point,
    declared,
    grid_of,
    moved_apart,
    neighbours,
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
        given = {"lr": run.config.optimizer.lr, **options}
        for name, wanted in best.rates().items():
            value = given.get(name, given["plain_lr"])
            loss += abs(RATES.index(value) - RATES.index(wanted))
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
    for label, point in BEST.items():
        assert point.options().items() <= found[label].items()
    assert found["galore_adamw"]["edge"] == ["lr"]
    assert sum(one["tried"] for one in found.values()) == len(trainer.seen)
    trials = found["adamw"].pop("trials")
    tried = found["adamw"].pop("tried")
    assert found["adamw"] == {**BEST["adamw"].options(), "val_loss": 4.0, "edge": []}
    assert len(trials) == tried
    assert {"lr": 3e-3, "plain_lr": 3e-3, "val_loss": 8.0} in trials


APART = {
    "adamw": Point(1e-3, 1e-2, embedding_lr=1e-1, head_lr=3e-3),
    "official:galore_adamw": Point(1e-2, 1e-2, None, "adafactor", 1e-1, 3e-3),
}


@pytest.mark.slow
def test_the_search_moves_rates_of_embeddings_and_head_apart_when_asked() -> None:
    trainer = Trainer(APART)
    entries = parse_methods(",".join(APART))
    found = tune(entries, trainer.make, trainer.run_all, lambda _: None, apart=True)
    for label, point in APART.items():
        assert point.options().items() <= found[label].items()
    assert found["adamw"]["edge"] == ["embedding_lr"]
    assert "embedding_lr" in declared(True)
    assert "embedding_lr" not in declared(False)


def test_packages_have_one_rate_for_embeddings_and_head_under_their_own_rule() -> None:
    ours, package, factored, given = parse_methods(
        "galore_adamw,official:galore_adamw,official:galore_adamw+plain_rule=adafactor,"
        "adamw+embedding_lr=0.05+plain_rule=own"
    )
    assert grid_of(ours, apart=True).apart == ("own", "adamw", "adafactor")
    assert grid_of(package, apart=True).apart == ("adamw", "adafactor")
    assert grid_of(factored, apart=True).apart == ("adafactor",)
    assert grid_of(ours).apart == ()
    tried = moved_apart(Point(1e-3, 1e-2), grid_of(given, apart=True))
    assert {point.head_lr for point in tried} == {3e-3, 3e-2}
    (own,) = parse_methods("official:galore_adamw+plain_rule=own")
    assert grid_of(own, apart=True).apart == ()


def test_back_under_the_own_rule_a_package_has_one_rate_again() -> None:
    (package,) = parse_methods("official:galore_adamw")
    apart = Point(1e-3, 1e-2, None, "adafactor", 1e-1, 3e-3)
    back = [p for p in neighbours(apart, grid_of(package, True)) if p.plain_rule == "own"]
    assert len(back) == 3
    assert {(point.embedding_lr, point.head_lr) for point in back} == {(None, None)}


def test_the_grid_is_what_a_method_has_and_its_entry_leaves_open() -> None:
    free, fixed, factored = parse_methods(
        "galore_adamw,adamw+lr=0.1+betas=[0.9,0.9]+plain_rule=own,galore_adafactor"
    )
    assert grid_of(free).betas == (None, (0.9, 0.95), (0.5, 0.99))
    assert grid_of(free).rules == ("own", "adamw", "adafactor")
    assert grid_of(fixed).betas == ((0.9, 0.9),)
    assert grid_of(fixed).rules == ("own",)
    assert grid_of(fixed).start == Point(0.1, 3e-3, (0.9, 0.9), "own")
    assert grid_of(parse_methods("cautious_adafactor")[0]).betas == (None, *BETAS)
    assert grid_of(factored).betas == (None,)
    # A method that is itself a rule has it already.
    assert grid_of(parse_methods("adamw")[0]).rules == ("own", "adafactor")


def test_what_an_entry_gives_is_no_coordinate_to_move_and_is_recorded() -> None:
    (entry,) = parse_methods("adamw+plain_lr=0.05+plain_rule=own+betas=[0.9,0.999]")
    grid = grid_of(entry, apart=True)
    around = {point.lr for point in neighbours(grid.start, grid)}
    assert around == {1e-3, 1e-2}
    # Embeddings and head start where plain_lr is, between two places of the grid.
    apart = moved_apart(grid.start, grid)
    assert {(point.embedding_lr, point.head_lr) for point in apart} == {
        *((rate, 0.05) for rate in (3e-2, 1e-1)),
        *((0.05, rate) for rate in (3e-2, 1e-1)),
    }

    def run_all(asked: Sequence[Run]) -> dict[str, Outcome]:
        assert all(run.config.optimizer.options["plain_lr"] == 0.05 for run in asked)
        return {run.key: Outcome(Path(), "", {"val_loss": 3.0}) for run in asked}

    found = tune([entry], Trainer({}).make, run_all, lambda _: None)[entry.label]
    assert {trial["plain_lr"] for trial in (found, *found["trials"])} == {0.05}
    assert found["betas"] == [0.9, 0.999]


def test_what_an_entry_gives_stands_above_the_rates_found_before() -> None:
    entry, other = parse_methods("adamw+lr=0.01+rank=4,adamw+plain_lr=null")
    rates = as_trained(entry, {"lr": 0.0015, "plain_lr": 0.03})
    assert rates == {"lr": 0.01, "plain_lr": 0.03}
    made = Trainer({}).make
    found = refine([entry], {entry.label: rates}, made, lambda runs: {}, lambda _: None)
    assert found == {entry.label: rates}
    assert as_trained(other, {"lr": 0.1, "plain_lr": 0.03}) == {"lr": 0.1, "plain_lr": None}
    assert grid_of(other).start.options() == {"lr": 3e-3}
    # Under either name of an option.
    (scaled,) = parse_methods("fira_adamw+alpha=2")
    assert as_trained(scaled, {"lr": 0.1, "alpha": 1}) == {"lr": 0.1, "scale": 2}
    assert made(scaled, {"lr": 0.1, "alpha": 1}).config.optimizer.options["scale"] == 2


@pytest.mark.parametrize("failing", [slice(1), slice(2), slice(1, 2), slice(-1, None)])
def test_a_run_that_fails_leaves_the_method_out_and_no_other(failing: slice) -> None:
    rounds = []

    def run_all(asked: Sequence[Run]) -> dict[str, Outcome]:
        rounds.append(len(asked))
        assert len(rounds) < 9
        own = [run.key for run in asked if run.entry.label == "galore_adamw"]
        lost = own[failing] if len(own) > 1 else []
        done = [run.key for run in asked if run.key not in lost]
        return {key: Outcome(Path(), "", {"val_loss": 3.0}) for key in done}

    entries = parse_methods("galore_adamw,adafactor")
    make = Trainer({}).make
    assert set(tune(entries, make, run_all, lambda _: None)) == {"adafactor"}
    rounds.clear()
    rates = {entry.label: {"lr": 0.01, "plain_lr": 0.03} for entry in entries}
    assert set(refine(entries, rates, make, run_all, lambda _: None)) == {"adafactor"}


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
    trials = found["galore_adamw"].pop("trials")
    assert trials == [
        {"lr": lr, "plain_lr": 0.03, "val_loss": abs(best - lr)} for lr in sorted(tried)
    ]
    chosen = min(tried, key=lambda lr: abs(best - lr))
    assert found["galore_adamw"] == {
        **{"lr": chosen, "plain_lr": 0.03, "val_loss": abs(best - chosen)},
        **{"tried": len(tried), "edge": edge},
    }


def test_files_without_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doesn't exist"):
        read_rates(tmp_path / "none.json")
    path = tmp_path / "rates.json"
    for text in ("{", "[]", '{"rows": []}', '{"rates": [1]}', '{"rates": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no rates"):
            read_rates(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plain_lr": 0.1}, "there is no lr; accepted: lr"),
        ({"lr": "1e-3"}, "lr is '1e-3'; accepted: a number"),
        ({"lr": True}, "lr is True; accepted: a number"),
        ({"lr": None}, "lr is None; accepted: a number"),
        ({"lr": 0.1, "head_lr": -1}, "head_lr is -1; accepted: a number of at least 0"),
        ({"lr": 0.1, "plan_lr": 0.1}, "unknown option 'plan_lr'; did you mean 'plain_lr'"),
        ({"lr": 0.1, "betas": 0.9}, "betas is 0.9; accepted: two numbers"),
        ({"lr": 0.1, "betas": [0.9]}, "betas is .*; accepted: two numbers"),
        ({"lr": 0.1, "plain_rule": "sgd"}, "plain_rule is 'sgd'; accepted: own, adamw"),
    ],
)
def test_wrong_rates_are_named(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    good = {"lr": 0.1, "betas": None, "update_interval": 3, "alpha": 1, "relora": 5}
    path.write_text(json.dumps({"rates": {"adamw": good}}))
    assert read_rates(path) == {"adamw": good}
    path.write_text(json.dumps({"rates": {"adamw": good, "muon": options}}))
    with pytest.raises(ValueError, match=f"rates.json: rates of muon: {said}"):
        read_rates(path)


def test_what_is_found_is_what_runs_are_made_with() -> None:
    trainer = Trainer(BEST)
    (entry,) = parse_methods("adamw")
    found = tune([entry], trainer.make, trainer.run_all, lambda _: None)["adamw"]
    made = make_run(SETTING, entry, 0, found).config.optimizer
    again = make_run(SETTING, entry, 0, BEST["adamw"].options()).config.optimizer
    assert made == again
    assert not {"val_loss", "tried", "edge"} & set(made.options)
