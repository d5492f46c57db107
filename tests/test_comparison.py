"""The comparison of methods: tuning on the grid, the ledger, the table, and one tiny run."""

from __future__ import annotations

import importlib
import json
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, tiny_model

from lowrank.optimizers import available, build


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def part(name: str) -> Any:
    return importlib.import_module(f"comparison.{name}")


class Immediately:
    """An executor that runs in place, on a function of its own."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.count = 0

    def submit(self, _: Any, setting: Any, job: Any) -> Future[Any]:
        self.count += 1
        future: Future[Any] = Future()
        future.set_result(self.call(setting, job))
        return future


def record(job: Any, loss: float) -> dict[str, Any]:
    return {
        "name": job.name,
        "lr": job.lr,
        "plain_lr": job.plain_lr,
        "seed": job.seed,
        "val_loss": loss,
        "ms_per_step": 1.0,
        "state_bytes": 2048,
        "seconds": 0.1,
    }


def ledger_at(path: Path) -> Any:
    return part("pool").Ledger(path, part("setting").Setting(), "mark")


def test_every_method_takes_part() -> None:
    entrants = part("entrants").entrants()
    assert set(available()) <= set(entrants)
    for entrant in entrants.values():
        assert entrant.method in available()
        assert entrant.plain in entrants


def test_tuning_walks_to_the_best_pair_and_shares_plain_rates(tmp_path: Path) -> None:
    tuning, entrants = part("tuning"), part("entrants").entrants()
    best = {"adamw": (1e-3, 3e-2), "galore_adamw": (1e-2, 3e-2)}

    def loss(_: Any, job: Any) -> dict[str, Any]:
        lr, plain = best[job.name]
        distance = [
            abs(tuning.GRID.index(a) - tuning.GRID.index(b))
            for a, b in ((job.lr, lr), (job.plain_lr, plain))
        ]
        return record(job, 4.0 + sum(distance))

    executor = Immediately(loss)
    ledger = ledger_at(tmp_path / "ledger.jsonl")
    picked = [entrants["adamw"], entrants["galore_adamw"]]
    tuned = tuning.tune(ledger, picked, executor, lambda text: None)
    assert {name: (r["lr"], r["plain_lr"]) for name, r in tuned.items()} == best
    first = executor.count
    tuning.tune(ledger, picked, executor, lambda text: None)
    assert executor.count == first  # the ledger has them all
    path = tmp_path / "rates.json"
    tuning.write_rates(path, {"adamw": tuned["adamw"]}, ledger)
    tuning.write_rates(path, {"galore_adamw": tuned["galore_adamw"]}, ledger)
    assert tuning.read_rates(path) == tuned
    with pytest.raises(ValueError, match="--tune makes it"):
        tuning.read_rates(tmp_path / "missing.json")


def test_packages_are_tuned_by_themselves(tmp_path: Path) -> None:
    tuning, entrant = part("tuning"), part("entrants").Entrant
    best = {"adamw": 1e-3, "galore_adamw": 1e-2, "the package": 3e-2}

    def loss(_: Any, job: Any) -> dict[str, Any]:
        places = tuning.GRID.index(job.lr) - tuning.GRID.index(best[job.name])
        return record(job, 4.0 + abs(places))

    picked = [entrant("adamw", None, "adamw", "adamw")]
    picked += [
        entrant(name, None, "galore_adamw", "adamw") for name in ("galore_adamw", "the package")
    ]
    ledger = ledger_at(tmp_path / "ledger.jsonl")
    tuned = tuning.tune(ledger, picked, Immediately(loss), lambda text: None)
    assert {name: rates["lr"] for name, rates in tuned.items()} == best
    assert len({rates["plain_lr"] for rates in tuned.values()}) == 1
    jobs = part("__main__").jobs_of(picked, tuned, [0, 1])
    assert {job.name: job.lr for job in jobs} == best
    with pytest.raises(ValueError, match="the package has no tuned learning rate"):
        part("__main__").jobs_of(picked, {n: tuned[n] for n in ("adamw", "galore_adamw")}, [0])


def test_rules_with_a_first_moment_share_no_rate_with_those_without() -> None:
    entrants = part("entrants").entrants()
    without = {"adafactor", "galore_adafactor", "coap_adafactor", "online_subspace_adafactor"}
    assert {entrants[name].plain for name in without} == {"adafactor"}
    first = {"flora_adafactor", "coap_adafactor_8bit"}
    assert {entrants[name].plain for name in first} == first
    for name in without:
        made = build(name, tiny_model(), rank=4)
        assert not any("exp_avg" in state for state in made.state.values())
    for name in first:
        made = build(name, tiny_model(), rank=4)
        assert any("exp_avg" in state for state in made.state.values())


def test_ledger_passes_over_a_broken_line_and_other_settings(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "ledger.jsonl")
    job = part("run").Job("adamw", 1e-3, 1e-3, 0)
    ledger.add(record(job, 4.5))
    with ledger.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record(job, 1.0) | {"mark": "other"}) + "\n" + '{"name": "ada')
    assert {j: r["val_loss"] for j, r in ledger.read().items()} == {job: 4.5}
    other = part("run").Job("adamw", 1e-3, 1e-3, 1)
    ledger.add(record(other, 4.6))
    assert {j: r["val_loss"] for j, r in ledger.read().items()} == {job: 4.5, other: 4.6}


def test_table_puts_packages_below_their_method(tmp_path: Path) -> None:
    module, job_class = part("table"), part("run").Job
    entrant = part("entrants").Entrant
    picked = [
        entrant("adamw", None, "adamw", "adamw"),
        entrant("galore_adamw", None, "galore_adamw", "adamw"),
        entrant("the package", None, "galore_adamw", "adamw"),
    ]
    jobs = [job_class(e.name, 1e-2, 3e-2, seed) for e in picked for seed in (0, 1)]
    losses = {"adamw": 4.5, "galore_adamw": 4.4, "the package": 4.45}
    records = {job: record(job, losses[job.name] + 0.1 * job.seed) for job in jobs}
    rows = module.lines(picked, records, jobs)
    assert [row.name for row in rows] == ["galore_adamw", "the package", "adamw"]
    assert rows[0].mean == pytest.approx(4.45)
    assert rows[0].error == pytest.approx(0.05)
    text = module.markdown(rows)
    assert "| `galore_adamw` | 4.4500 +- 0.0500 |  | 85.6 | 2 | 0.01 / 0.03 |" in text
    assert "the package | 4.5000 +- 0.0500 | -0.0500 +- 0.0000 | 90.0 |" in text
    assert text.count("\n") == 4
    records[jobs[0]]["val_loss"] = math.inf
    assert "diverged" in module.markdown(module.lines(picked, records, jobs))


def test_a_tiny_run_trains() -> None:
    setting = part("setting").Setting(
        steps=12,
        batch_size=2,
        hidden=32,
        inner=48,
        layers=1,
        heads=2,
        rank=8,
        vocabulary=300,
        sequence_length=32,
        validation_tokens=512,
    )
    run, job = part("run").run, part("run").Job
    results = [run(setting, job(name, 3e-3, 1e-2, 0)) for name in ("adamw", "fira_adamw")]
    again = run(setting, job("fira_adamw", 3e-3, 1e-2, 0))
    assert all(3.0 < result["val_loss"] < 5.69 for result in results)  # ln 300 = 5.70
    assert again["val_loss"] == results[1]["val_loss"]
    assert results[0]["state_bytes"] > results[1]["state_bytes"]


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main = part("__main__").main
    rates = ["--rates", str(tmp_path / "none.json"), "--ledger", str(tmp_path / "l.jsonl")]
    assert main(["--methods", "galore_adam", *rates]) == 2
    assert "did you mean 'galore_adamw'" in capsys.readouterr().err
    assert main(["--methods", "adamw", "--data", str(tmp_path / "nowhere"), *rates]) == 2
    assert "nowhere" in capsys.readouterr().err
