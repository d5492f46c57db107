"""What was passed over is counted and told: the optimizer's updates, and documents."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pretrain import crash
from test_table import SUMMARY, rendered, row
from tiny_runs import comparable_metrics, summary

from lowrank.optimizers import GaLoreAdamW
from lowrank.trainers.report import write_report

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that leaves out two updates in its third and fourth step, and counts them."""
    take = GaLoreAdamW.step

    def step(self: GaLoreAdamW, closure: None = None) -> None:
        number = 1 + int(next(iter(self.state.values()), {}).get("step", 0))
        self.counted = getattr(self, "counted", 0) + (2 if number in (3, 4) else 0)
        take(self, closure)

    monkeypatch.setattr(GaLoreAdamW, "step", step)
    counted = property(lambda self: getattr(self, "counted", 0))
    monkeypatch.setattr(GaLoreAdamW, "skipped", counted, raising=False)


@pytest.mark.usefixtures("counting")
def test_the_optimizers_count_is_recorded_and_told_once(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, output, errors = run(tiny(whole, 6))
    assert (status, errors) == (0, "")
    assert output.count("warning: by step 3 the optimizer has passed over 2 parameter update") == 1
    assert "Skipped updates" in output
    steps = [item for item in comparable_metrics(whole) if item["kind"] == "train"]
    assert [item["skipped"] for item in steps] == [0, 0, 2, 4, 4, 4]
    assert summary(whole)["skipped"] == 4
    assert "4 parameter updates passed over" in write_report(whole).read_text()
    # The counter above isn't saved with the optimizer: the run's own goes on.
    crash(run, tiny(broken, 6), 3)
    assert run(tiny(broken, 6, "--resume=auto"))[0] == 0
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["skipped"] == 4


def test_no_count_reads_as_none_skipped(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    _, output, _ = run(tiny(tmp_path / "run", 2, optimizer="adamw"))
    assert "passed over" not in output
    assert summary(tmp_path / "run")["skipped"] == 0


@pytest.mark.filterwarnings("default::UserWarning")
def test_skipped_documents_are_told_at_the_end(
    tiny: Tiny, run: Run, tmp_path: Path, corpus: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    (data / "bad.jsonl").write_text('{"body": "none"}\n{"text": 3}\n')
    (data / "bad.val.jsonl").write_text("nonsense\n")
    status, output, errors = run(
        tiny(tmp_path / "run", 60, f"--data={data}", "eval.every=0", "checkpoint.every=0")
    )
    assert status == 0
    assert "bad.jsonl line 1: the JSON object has no field 'text' (it has 'body'" in errors
    content = summary(tmp_path / "run")
    assert int(str(content["skipped_documents"])) >= 2
    assert content["skipped_validation_documents"] == 1
    assert "Skipped documents" in output
    assert "Skipped in validation" in output


def test_the_table_names_each_kind_where_there_was_any() -> None:
    kinds = {"skipped": "Skipped updates", "skipped_documents": "Skipped documents"}
    for key, name in kinds.items():
        assert row(rendered({**SUMMARY, key: 1234}, 120), name)[1] == "1,234"
    assert "Skipped" not in rendered({**SUMMARY, **dict.fromkeys(kinds, 0)}, 120)


def test_sizes_in_memory_are_measured_at_events_alone(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank.trainers import memory

    measured: list[int] = []
    sizes = memory.sizes

    def counted(*arguments: Any) -> dict[str, int]:
        measured.append(1)
        return sizes(*arguments)

    monkeypatch.setattr(memory, "sizes", counted)
    run(tiny(tmp_path / "run", 10, "optimizer.update_proj_gap=6", "eval.every=0"))
    assert len(measured) == 2  # with the first basis and the second
    monkeypatch.setattr(memory.MemoryMeter, "EVERY", 4)
    run(tiny(tmp_path / "adamw", 10, "eval.every=0", optimizer="adamw"))
    assert len(measured) == 2 + 3  # in the steps 1, 5 and 9
