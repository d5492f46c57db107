"""The first steps of a run measured phase by phase, beside the plan."""

import json
from pathlib import Path

import pytest
from tiny_runs import TINY, write_corpus

from lowrank.trainers.cli import main


@pytest.fixture(params=["false", "true"])
def ran(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    data, folder = write_corpus(tmp_path / "data"), tmp_path / "run"
    arguments = ["pretrain", f"--data={data}", "--steps=5", f"--output={folder}", *TINY]
    settings = ("log.memory_steps=4", "model.hidden_size=64", "model.vocab_size=1000")
    assert main([*arguments, *settings, f"model.autocast={request.param}"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("clip", [(), ("train.clip=1",)])
def test_a_run_with_updates_in_backward_is_planned_with_its_micro_batches(
    tmp_path: Path, clip: tuple[str, ...]
) -> None:
    data, folder = write_corpus(tmp_path / "data"), tmp_path / "run"
    arguments = ["pretrain", f"--data={data}", "--steps=5", f"--output={folder}", *TINY]
    settings = ("log.memory_steps=4", "model.hidden_size=64", "model.vocab_size=1000")
    early = ("train.update_in_backward=true", "train.accumulation=3", *clip)
    assert main([*arguments, *settings, *early]) == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (found,) = (record for record in records if record["kind"] == "memory")
    for name, peak in found["measured"].items():
        assert found["planned"][name] == pytest.approx(peak, rel=0.05), name
    assert "Plan is off by" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_run_holds_measured_memory_against_the_plan(ran: Path) -> None:
    records = [json.loads(line) for line in (ran / "metrics.jsonl").read_text().splitlines()]
    (found,) = (record for record in records if record["kind"] == "memory")
    assert found["step"] == found["steps"] == 4
    assert set(found["measured"]) == {"forward", "backward", "step", "refresh"}
    for name, peak in found["measured"].items():
        assert found["planned"][name] == pytest.approx(peak, rel=0.05), name
    text = (ran / "report.html").read_text()
    assert "Plan is off by" in text


def test_a_run_measures_nothing_unless_asked(tmp_path: Path) -> None:
    data, folder = write_corpus(tmp_path / "data"), tmp_path / "run"
    assert main(["pretrain", f"--data={data}", "--steps=1", f"--output={folder}", *TINY]) == 0
    assert '"kind": "memory"' not in (folder / "metrics.jsonl").read_text()
    assert "Plan is off by" not in (folder / "report.html").read_text()
