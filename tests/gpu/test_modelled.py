"""gpu-check: modelled steps beside measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_ins import context, part


def filled(file: Path, about: Any) -> Any:
    """A record with three measured steps, after the model has looked at them."""
    record = part("record").Record("steps", file, {})
    for name in ("torch AdamW, fused", "galore_adamw", "galore_adamw, graph"):
        record.add("60m", name, 10.0, "ms")
    part("modelled").Modelled(record, about).fill()
    assert record.errors == []
    return record


def test_measured_steps_get_what_is_modelled(file: Path) -> None:
    record = filled(file, context())
    fused, eager, graph, modelled, replayed = record.rows
    assert not fused.details
    assert modelled.name == "galore_adamw: modelled"
    assert modelled.value == eager.details["modelled_ms"] > 0
    assert eager.details["modelled_ms"] == pytest.approx(
        max(eager.details["modelled_device_ms"], eager.details["modelled_host_ms"])
    )
    assert graph.details["modelled_ms"] == replayed.value < modelled.value
    assert f"{modelled.value / 10:.2f} x measured" in modelled.note
    written = {row["name"]: row["details"] for row in json.loads(file.read_text())["rows"]}
    assert written["galore_adamw"]["modelled_ms"] == modelled.value


def test_counting_has_its_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part("modelled"), "MOST", -1.0)
    record = filled(file, context())
    assert len(record.rows) == 3
    (skipped,) = record.skipped
    assert skipped["what"] == "modelled: 60m galore_adamw, 60m galore_adamw, graph"


def test_without_rates_or_the_planner_nothing_is_modelled(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = context()
    section = part("section")
    bare = section.Context(about.root, about.clock, about.size, None)
    assert "rates were not measured" in filled(file, bare).facts["modelling"]
    monkeypatch.setattr(part("modelled"), "PLAN", "lowrank.made_up")
    record = filled(file, about)
    assert "lowrank.made_up" in record.facts["modelling"]
    assert len(record.rows) == 3


def test_a_counted_step_is_modelled_too(file: Path) -> None:
    about = context()
    launches, methods = part("launches"), part("methods")
    record = part("record").Record("launches", file, {})
    modelled = part("modelled").Modelled(record, about)
    model = about.size.models["1b"]
    method = next(one for one in methods.CORE if one.name == "galore_adamw")
    launches.compare(record, about, model, method, launches.counter(record), modelled)
    (row,) = record.rows
    assert row.details["modelled_device_ms"] > 0
    assert f"{row.details['modelled_device_ms']:.3g} ms of kernels modelled" in row.note
