"""The table of `grid.py`, which itself takes long and is run by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grid import MARKS, STRATEGIES, options, put, read, table

from lowrank.optimizers import available


def test_a_row_has_a_cell_for_each_strategy_and_number_of_processes(tmp_path: Path) -> None:
    log = tmp_path / "cells.jsonl"
    cells = [
        ("adamw", "DDP", 2, 1.4e-7),
        ("adamw", "DDP", 3, 2.6e-7),
        ("adamw", "FSDP2", 2, 0.0),
        ("adamw", "FSDP2", 3, 0.0),
        ("muon", "ZeRO 3", 2, "muon can't be cut"),
        ("muon", "ZeRO 3", 3, "muon can't be cut"),
        ("muon", "ZeRO 1", 2, 3e-7),
    ]
    log.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    head, _, adamw, muon = table(read(log), (2, 3)).splitlines()
    columns = [f"{strategy}, {world}" for strategy in STRATEGIES for world in (2, 3)]
    assert head == f"| method | {' | '.join(columns)} |"
    assert adamw == f"| adamw | 1e-07 | 3e-07 | 0e+00 | 0e+00 |{' - |' * 8}"
    assert muon == f"| muon |{' - |' * 6} 3e-07 | - | - | - | refused | refused |"


def test_the_table_of_a_page_is_replaced() -> None:
    page = f"Before.\n{MARKS[0]}\n\n| old |\n\n{MARKS[1]}\n\nAfter.\n"
    made = put("| new |\n", page)
    assert made == page.replace("old", "new")
    assert put("| new |\n", made) == made
    with pytest.raises(ValueError, match="without"):
        put("| new |\n", "no marks")


def test_what_is_missing_is_read_as_not_done(tmp_path: Path) -> None:
    assert read(tmp_path / "cells.jsonl") == {}


def test_every_method_refreshes_several_times() -> None:
    for name in available():
        found = options(name)
        gaps = [found[key] for key in ("update_proj_gap", "refactor_gap") if key in found]
        assert min(gaps) <= 7, name
