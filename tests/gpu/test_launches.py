"""gpu-check: launches of a step beside those that are counted without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import on_gpu, part, ran


def counting(seen: list[Any]) -> Any:
    """Stands in for what counts a step's launches."""

    def count(name: str, shape: tuple[int, int], number: int, **options: Any) -> Any:
        seen.append((name, shape, number, options["rank"]))
        return SimpleNamespace(
            operations=2, filled=1, products=2 * number, passes=1, reads=1, by_name={}
        )

    return count


@pytest.mark.slow
def test_launches_are_measured_beside_those_that_are_counted(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(part("launches"), "counter", lambda record: counting(seen))
    record = ran("launches", file)
    methods, model = part("methods"), part("workload").SIZES["tiny"].models["1b"]
    labels = {m.label for m in (*methods.CORE, *methods.OTHERS) if m.name}
    rows = {row.name: row for row in record.rows}
    assert rows.keys() == labels
    assert len(seen) == len(labels)
    number = 4 * model.layers
    assert ("galore_adamw", (model.hidden,) * 2, number, model.rank) in seen
    row = rows["galore_adamw"]
    assert row.unit == "operations"  # a CPU launches nothing
    assert row.value == row.details["started"] >= 2 * number
    assert row.details["counted"]["launches"] == 2 * number + 4
    assert f"{number} matrices; {2 * number + 4} counted (1 reads), " in row.note
    assert row.aim is None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("gpu")
def test_launches_of_a_gpu_have_an_aim(
    file: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise ValueError("can't be counted")

    launches = part("launches")
    monkeypatch.setattr(launches, "OTHERS", ())
    monkeypatch.setattr(launches, "CORE", launches.CORE[:2])
    monkeypatch.setattr(launches, "counter", lambda record: broken if fails else counting([]))
    event = SimpleNamespace(
        name=lambda: "cudaLaunchKernel",
        device_type=lambda: SimpleNamespace(name="CPU"),
        duration_ns=lambda: 1000,
    )
    monkeypatch.setattr(part("tracing"), "events_of", lambda record: [event] * 50)
    (row,) = ran("launches", file, on_gpu()).rows
    assert (row.name, row.value, row.unit) == ("galore_adamw", 50, "launches")
    if fails:
        assert row.aim is None
        assert "not counted: ValueError: can't be counted" in row.note
    else:
        assert row.aim == 1.25 * row.details["counted"]["launches"] + 2
        assert row.met is False
    assert "0 waits" in row.note


def test_launches_without_counting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = part("launches")
    monkeypatch.setattr(launches, "COUNTING", "lowrank.made_up")
    record = part("record").Record("launches", file, {})
    assert launches.counter(record) is None
    assert "lowrank.made_up" in record.facts["counting"]
    found = launches.counts(None, None, (1, 1), 1, None)
    assert found == {"launches": None, "problem": "this checkout has no lowrank.made_up"}


def test_what_starts_something_is_counted_without_views() -> None:
    x = torch.ones(4, 4)

    def call() -> None:
        y = torch.empty_like(x.view(16).view(4, 4).T)
        y.copy_(x)
        y[0].add_(float(x.sum().item()))

    found = part("tracing").started(call)
    assert found["most_started"] == {"copy_": 1, "add_": 1, "sum": 1}
    assert (found["started"], found["host_reads"]) == (3, 1)
