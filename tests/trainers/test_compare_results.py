"""Tables and the page of a comparison, from runs' folders."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import MIB, RunPlan, write_run

from lowrank.trainers.compare.entries import parse_methods
from lowrank.trainers.compare.memory import CATEGORIES
from lowrank.trainers.compare.plan import Run, make_run
from lowrank.trainers.compare.pool import Outcome, outcome
from lowrank.trainers.compare.results import Results, make_rows, optimizer_times
from lowrank.trainers.compare.setting import Setting
from lowrank.trainers.compare.tables import as_csv, as_dict, front, markdown, write_tables
from lowrank.trainers.compare.worker import FAILED
from lowrank.trainers.report.compare_page import render_compare, write_compare_report

METHODS = ("galore_adamw", "official:galore_adamw", "adamw", "muon+lr=0.5")
LOSSES = {"galore_adamw": 4.6, "official:galore_adamw": 4.61, "adamw": 4.5, "muon+lr=0.5": 4.9}
STATES = {"galore_adamw": 20, "official:galore_adamw": 21, "adamw": 60, "muon+lr=0.5": 40}
SETTING = Setting(methods=METHODS, seeds=(0, 1), model="llama_1m", steps=60, data_sha256="d")


def timed(folder: Path) -> None:
    """Adds the optimizer's own time to a synthetic run: 10 ms, 30 with a refresh."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        item = json.loads(text)
        if item["kind"] == "train":
            refreshes = (item["step"] - 1) % 20 == 0
            item["time"]["optimizer_seconds"] = 0.03 if refreshes else 0.01
        lines.append(json.dumps(item))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def trained(root: Path, runs: Mapping[str, list[Run]], absent: frozenset[str]) -> None:
    for label, own in runs.items():
        for each in own:
            if each.key in absent:
                continue
            plan = RunPlan(
                optimizer=each.entry.optimizer,
                steps=60,
                gap=20,
                eval_every=20,
                seed=each.seed,
                moments=STATES[label] * MIB,
                basis=0,
                final_loss=LOSSES[label],
                summary={
                    "steps": 60,
                    "val_loss": LOSSES[label] + each.seed,
                    "val_perplexity": math.exp(LOSSES[label] + each.seed),
                    "bits_per_byte": LOSSES[label] / 2,
                },
            )
            timed(write_run(each.folder(root), plan))


def compared(root: Path, absent: int = 0) -> Results:
    entries = parse_methods(",".join(METHODS))
    runs = {e.label: [make_run(SETTING, e, seed, {}) for seed in (0, 1)] for e in entries}
    every = [each for own in runs.values() for each in own]
    left = frozenset(each.key for each in every[len(every) - absent :])
    trained(root, runs, left)
    found = {each.key: outcome(root, each) for each in every}
    done: dict[str, Outcome] = {key: one for key, one in found.items() if one is not None}
    predictions = {label: dict.fromkeys(CATEGORIES, MIB) for label in METHODS}
    missing = tuple((each.entry.label, each.seed) for each in every if each.key not in done)
    about = {"model": "llama_1m", "data": "<b>", "steps": 60, "seeds": [0, 1], "tuned": True}
    return Results(
        make_rows(runs, done, predictions, {"adamw": ["a remark"]}),
        missing,
        {"official:fira_adamw": "fira is not installed"},
        {},
        {"adamw": {"lr": 0.1, "val_loss": 4.5, "tried": 7, "edge": ["lr"]}},
        about,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return compared(tmp_path_factory.mktemp("compared"))


def test_rows_hold_means_and_paired_differences(results: Results) -> None:
    rows = {row.entry.label: row for row in results.rows}
    assert [row.entry.label for row in results.ordered] == [
        "adamw",
        "galore_adamw",
        "official:galore_adamw",
        "muon+lr=0.5",
    ]
    adamw = rows["adamw"]
    assert adamw.loss is not None
    assert (adamw.loss.mean, adamw.loss.error) == (pytest.approx(5.0), pytest.approx(0.5))
    assert adamw.against is not None
    assert adamw.against.mean == pytest.approx(-0.1)
    assert adamw.against.error == pytest.approx(0.0, abs=1e-12)
    assert rows["galore_adamw"].against is None
    theirs = rows["official:galore_adamw"].ours
    assert theirs is not None
    assert theirs.mean == pytest.approx(-0.01)
    assert rows["galore_adamw"].ours is None
    assert adamw.state == 60 * MIB + 2048
    assert adamw.held == 94 * MIB + 2048
    # The official package is as cheap as nothing better; AdamW is the best.
    assert front(results) == ["galore_adamw", "adamw"]


def test_times_are_those_between_refreshes(results: Results) -> None:
    seed = results.rows[0].seeds[0]
    assert seed.optimizer_ms == pytest.approx(10)
    assert seed.worst_ms == pytest.approx(30)
    assert seed.refresh_ms == pytest.approx(900, rel=0.3)
    assert seed.step_ms == pytest.approx(520, rel=0.1)


def test_a_line_that_broke_off_is_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RunPlan(steps=10))
    timed(folder)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    assert len(optimizer_times(folder).steps) == 10


def test_tables(results: Results, tmp_path: Path) -> None:
    write_tables(results, tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert lines[0]["method"] == "adamw"
    assert float(lines[0]["difference"]) == pytest.approx(-0.1)
    assert lines[1]["difference"] == ""
    assert (lines[0]["pareto"], lines[3]["pareto"]) == ("1", "0")
    assert int(lines[0]["moments_measured"]) == 60 * MIB
    assert int(lines[0]["moments_predicted"]) == MIB
    assert lines[0]["remarks"] == "a remark"
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"][2]["ours_minus_theirs"]["mean"] == pytest.approx(-0.01)
    assert content["rows"][0]["runs"][1]["val_loss"] == pytest.approx(5.5)
    assert content["skipped"] == {"official:fira_adamw": "fira is not installed"}
    text = markdown(results)
    assert "| `adamw` | 5.0000 +- 0.5000 | -0.1000 +- 0.0000 |  |" in text
    assert "| &nbsp;&nbsp;official:galore_adamw | 5.1100 +- 0.5000 |" in text


def test_the_page_is_whole_and_fetches_nothing(results: Results, tmp_path: Path) -> None:
    page = write_compare_report(results, tmp_path).read_text()
    for title in ("Results", "Quality", "Learning", "Memory", "Time", "Tuning", "Runs", "Setting"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<figure") == 5
    # Each figure has one drawing for wide screens and one for phones, with ids of its own.
    assert page.count('<svg class="narrow"') == 5
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "width=device-width" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "<b>&lt;b&gt;</b>" in page
    assert "fira is not installed" in page
    assert "best rate lies at an end of the grid: adamw" in page


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    found = compared(tmp_path, absent=3)
    assert [row.entry.label for row in found.rows] == [*METHODS[:3]]
    assert [len(row.seeds) for row in found.rows] == [2, 2, 1]
    # Ranked by seed 0, which all have: AdamW isn't put behind for its missing seed, nor before.
    assert found.shared == {0}
    assert [row.entry.label for row in found.ordered] == ["adamw", *METHODS[:2]]
    text = markdown(found)
    assert "| `adamw` | 4.5000 (1 of 2 seeds) | -0.1000 (1 of 2 seeds) |" in text
    assert "| `galore_adamw` | 5.1000 +- 0.5000 |" in text
    assert as_dict(found)["ranked_by_seeds"] == [0]
    page = render_compare(found, "c")
    assert "by seeds that they all finished: 0." in page
    assert '<td class="figure">1 of 2</td>' in page
    assert "Not finished: adamw seed 1, muon+lr=0.5 seed 0, muon+lr=0.5 seed 1" in page
    assert render_compare(replace(found, rows=()), "c").count("<figure") == 0


def test_a_run_that_broke_off_is_no_result(tmp_path: Path) -> None:
    entries = parse_methods("galore_adamw,adamw")
    runs = {e.label: [make_run(SETTING, e, seed, {}) for seed in (0, 1)] for e in entries}
    broken = runs["adamw"][1]
    trained(tmp_path, runs, frozenset({broken.key}))
    write_run(broken.folder(tmp_path), RunPlan(steps=9, finished=False))
    (broken.folder(tmp_path) / FAILED).write_text('{"reason": "10 steps skipped"}')
    every = [each for own in runs.values() for each in own]
    done = {each.key: one for each in every if (one := outcome(tmp_path, each)) is not None}
    assert len(done) == 4
    found = Results(make_rows(runs, done, {}, {}))
    row = found.rows[1]
    assert row.loss is not None
    assert math.isinf(row.loss.mean)
    assert row.remarks == ("seed 1 broke off: 10 steps skipped",)
    # It must not win by the seed that is left, nor draw a point.
    assert [each.entry.label for each in found.ordered] == ["galore_adamw", "adamw"]
    assert front(found) == ["galore_adamw"]
    assert "| `adamw` | broke off |" in markdown(found)
    assert json.loads(json.dumps(as_dict(found)))["rows"]
    assert "inf" in as_csv(found)
    assert "broke off" in render_compare(found, "c")


def rowed(tmp_path: Path, seeds: Mapping[str, Mapping[int, float]], asked: int = 3) -> Results:
    """Results with a loss for each method and seed; None breaks off."""
    entries = parse_methods(",".join(seeds))
    runs, done = {}, {}
    for entry in entries:
        own = [make_run(SETTING, entry, seed, {}) for seed in range(asked)]
        runs[entry.label] = own
        for each in own:
            loss = seeds[entry.label].get(each.seed)
            if loss is None:
                continue
            folder = write_run(each.folder(tmp_path), RunPlan(steps=60, moments=MIB))
            summary = {"val_loss": loss, "val_perplexity": math.exp(loss)}
            broken = math.isinf(loss)
            done[each.key] = Outcome(folder, "skipped" if broken else "", {} if broken else summary)
    return Results(make_rows(runs, done, {}, {}))


def test_methods_are_ranked_by_the_seeds_that_all_have(tmp_path: Path) -> None:
    # Seed 2 is hard for all: the method that lacks it must not win by that.
    full, worse = {0: 4.0, 1: 4.0, 2: 6.0}, {0: 4.1, 1: 4.1}
    found = rowed(tmp_path, {"adamw": full, "muon": worse})
    assert found.shared == {0, 1}
    assert [row.entry.label for row in found.ordered] == ["adamw", "muon"]
    assert front(found) == ["adamw"]
    page = render_compare(found, "c")
    assert re.search(r'<tr><th scope="row">1  adamw</th><td class="figure best">', page)
    assert "4.1000 +- 0.0000 (2 of 3 seeds)" in page
    assert "+0.1000 +- 0.0000 (2 of 3 seeds)" in page


def test_a_method_without_the_seeds_of_the_others_ranks_last(tmp_path: Path) -> None:
    losses = {"muon": {2: 3.0}, "adamw": {0: 4.0, 1: 4.0}, "adafactor": {0: 4.1, 1: 3.8}}
    found = rowed(tmp_path, losses)
    assert found.shared == {0, 1}
    assert [row.entry.label for row in found.ordered] == ["adafactor", "adamw", "muon"]
    assert "muon" not in front(found)
    assert "muon did not and stand last" in render_compare(found, "c")


def test_a_difference_says_that_a_broken_seed_is_left_out(tmp_path: Path) -> None:
    losses = {"adamw": {0: 4.0, 1: 4.0, 2: 4.0}, "muon": {0: 4.1, 1: math.inf, 2: 4.1}}
    found = rowed(tmp_path, losses)
    assert found.shared == {0, 1, 2}
    assert "| `muon` | broke off | +0.1000 +- 0.0000 (2 of 3 seeds) |" in markdown(found)


def test_the_page_has_every_setting_that_was_tried(results: Results) -> None:
    best = {"lr": 0.003, "plain_lr": 0.03, "embedding_lr": 0.1, "betas": [0.9, 0.95]}
    trials = [{**best, "val_loss": 4.25}, {**best, "lr": 0.01, "val_loss": None}]
    found = {**trials[0], "tried": 2, "edge": ["embedding_lr"], "trials": trials}
    page = render_compare(replace(results, rates={"adamw": found}), "tuned")
    assert "All 2 that were tried" in page
    rows = re.findall(r'<tr><th scope="row">adamw</th>.*?</tr>', page)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    same = ["0.03", "0.1", "0.03", "(0.9, 0.95)", "own"]
    assert ["0.003", *same, "4.2500", "2"] in cells
    assert ["0.003", *same, "4.2500"] in cells
    assert ["0.01", *same, "--"] in cells
