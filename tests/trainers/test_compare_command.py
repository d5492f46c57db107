"""What a comparison carries out and reports, with runs that end without being trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowrank.trainers.compare import command
from lowrank.trainers.compare.command import compare, report
from lowrank.trainers.compare.decide import Asked, decide, remarks
from lowrank.trainers.compare.memory import held
from lowrank.trainers.compare.plan import Run
from lowrank.trainers.compare.pool import Outcome
from lowrank.trainers.compare.prepare import prepare, with_memory
from lowrank.trainers.compare.setting import Setting, read_setting, write_setting

BASE = Setting(
    methods=("adamw", "galore_adamw"), seeds=(0,), model="llama_1m", steps=40, data_sha256="d"
)
BEFORE = {"lr": 0.01, "plain_lr": 0.03}


class Pool:
    """Ends every run at once, with the loss that its options have."""

    def __init__(self, loss: Any = lambda run: 4.0, failing: frozenset[str] = frozenset()) -> None:
        self._loss, self._failing = loss, failing
        self.failed: dict[str, str] = {}
        self.runs: list[Run] = []

    def run_all(self, runs: Sequence[Run]) -> dict[str, Outcome]:
        self.runs += runs
        failing = [run for run in runs if run.entry.label in self._failing]
        self.failed |= {run.key: "no memory" for run in failing[-1:]}
        return {
            run.key: Outcome(Path("nowhere"), "", {"val_loss": self._loss(run)})
            for run in runs
            if run.key not in self.failed
        }

    def close(self) -> None:
        """Nothing is open."""


def opened(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def open_pool(*_: object) -> Iterator[Pool]:
        yield pool

    monkeypatch.setattr(command, "open_pool", open_pool)


def ended(folder: Path, runs: Sequence[Run], loss: float = 4.0) -> None:
    for run in runs:
        place = run.folder(folder)
        place.mkdir(parents=True)
        summary = {"steps": run.config.train.steps, "val_loss": loss, "val_perplexity": 50.0}
        (place / "summary.json").write_text(json.dumps(summary))


def test_a_failed_tuning_run_ends_its_method_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pool = Pool(failing=frozenset({"galore_adamw"}))
    opened(pool, monkeypatch)
    methods = "adafactor+plain_rule=own+plain_lr=0.01,galore_adamw"
    asked = Asked(tmp_path / "c", methods, (0,), "llama_1m", str(corpus), 12, tune=True)
    with pytest.raises(command.TrainingError, match=r"1 run\(s\) ended with an error"):
        compare(asked, Console())
    trained = [run.entry.label for run in pool.runs if run.seed == 0]
    assert trained == [methods.split(",")[0]]
    content = json.loads((tmp_path / "c" / "results.json").read_text())
    assert set(content["rates"]) == {methods.split(",")[0]}
    assert set(content["untuned"]) == {"galore_adamw"}
    assert content["missing"] == []
    assert "galore_adamw has no row: its tuning isn't finished" in capsys.readouterr().out


def test_a_report_of_an_interrupted_search_has_the_methods_that_are_tuned(
    tmp_path: Path, capsys: Any
) -> None:
    rates = {label: BEFORE for label in BASE.methods}
    setting = replace(BASE, tune=True, rates=rates)
    write_setting(setting, tmp_path)
    plan = prepare(setting)
    adamw, galore = plan.entries
    for entry, factors in ((adamw, (0.5, 1, 2)), (galore, (0.5, 2))):
        tried = [plan.run(entry, 100, {**BEFORE, "lr": 0.01 * factor}) for factor in factors]
        ended(tmp_path, tried[1:2], 3.0)
        ended(tmp_path, [*tried[:1], *tried[2:]])
    ended(tmp_path, [plan.run(adamw, 0, BEFORE), plan.run(galore, 0, BEFORE)])
    page = report(tmp_path, Console()).read_text()
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in content["rows"]] == ["adamw"]
    assert content["rates"]["adamw"]["lr"] == 0.01
    assert set(content["untuned"]) == {"galore_adamw"}
    for text in (page, capsys.readouterr().out):
        assert "galore_adamw has no row: its tuning isn" in text


def test_equal_memory_holds_for_the_rule_that_tuning_finds() -> None:
    methods = ("galore_adamw", "apollo_adamw")
    plan = prepare(replace(BASE, methods=methods, model="llama_9m", equal="memory", tune=True))
    rates: Mapping[str, Mapping[str, Any]] = {
        "galore_adamw": BEFORE,
        "apollo_adamw": {**BEFORE, "plain_rule": "adafactor"},
    }
    final, runs = command._final(plan, rates)
    first, other = (runs[label][0].config for label in methods)
    # What Adafactor saves of embeddings and head is there for a larger rank.
    assert final.ranks["apollo_adamw"] > plan.ranks["apollo_adamw"]
    assert final.remarks["apollo_adamw"] == [f"tuned at rank {plan.ranks['apollo_adamw']}"]
    assert other.optimizer.options["rank"] == final.ranks["apollo_adamw"]
    more = {**other.optimizer.options, "rank": final.ranks["apollo_adamw"] + 1}
    above = replace(other, optimizer=replace(other.optimizer, options=more))
    assert held(other) <= held(first) < held(above)
    sizes = final.predictions["apollo_adamw"]
    assert sum(size for name, size in sizes.items() if name != "gradients") == held(other)


def test_a_rank_of_its_own_is_refused_where_ranks_are_chosen() -> None:
    # The first method's is what the others are held against.
    assert not prepare(
        replace(BASE, methods=("galore_adamw+rank=8", "adamw"), equal="memory")
    ).ranks
    methods = ("galore_adamw", "fira_adamw+rank=8")
    with pytest.raises(ValueError, match=r"fira_adamw\+rank=8: .*leave rank away, or .*steps"):
        prepare(replace(BASE, methods=methods, equal="memory"))
    assert prepare(replace(BASE, methods=methods))


def test_without_tuning_memory_is_that_of_the_rates_given() -> None:
    setting = replace(BASE, rates={label: BEFORE for label in BASE.methods})
    plan = prepare(setting)
    assert with_memory(plan, setting.rates) == plan


def test_what_another_comparison_wrote_meanwhile_is_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    asked = Asked(folder, "adamw", (0,), "llama_1m", str(corpus), 12)
    hold = command._hold

    @contextmanager
    def late(place: Path) -> Iterator[None]:
        write_setting(decide(replace(asked, methods="muon", seeds=(1,))), place)
        with hold(place):
            yield

    monkeypatch.setattr(command, "_hold", late)
    pool = Pool()
    opened(pool, monkeypatch)
    compare(asked, Console())
    kept = read_setting(folder)
    assert kept is not None
    assert (kept.methods, kept.seeds) == (("muon", "adamw"), (1, 0))
    assert {(run.entry.label, run.seed) for run in pool.runs} == {
        *(("muon", seed) for seed in (0, 1)),
        *(("adamw", seed) for seed in (0, 1)),
    }


def test_rates_of_another_model_and_another_first_method_are_told(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"model": "llama_9m", "rates": {"adamw": {"lr": 0.001}}}))
    assert remarks(Asked(tmp_path, "adamw,muon", rates=None), BASE) == []
    assert remarks(Asked(tmp_path, "galore_adamw,adamw", rates=file), BASE) == [
        f"--rates {file} are of llama_9m, and are taken for llama_1m",
        "differences are to adamw, the folder's first, not galore_adamw",
    ]
