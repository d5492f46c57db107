"""FSDP2: `fully_shard(model)`, then `build`, follows one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsdp2_runs import QUICK, Case, check, follow, limit
from sharded import run

#: The slow tests have the others.
FEW = [case for case in QUICK if case[0] in ("adamw", "galore_adamw_8bit", "fira_adamw")]


def test_two_ranks_follow_one_process(tmp_path: Path) -> None:
    made = run(follow, 2, tmp_path, FEW, [2], 10)
    far = {k: gap for k, gap in check(made, FEW, [2]).items() if not gap <= limit(k)}
    assert not far


COLUMNS: list[Case] = [
    *QUICK,
    ("flora_adafactor", {"proj_type": "reverse_std"}),
    ("galore_adafactor", {"beta1": 0.9}),
    ("galore_muon", {}),
    ("cautious_adafactor", {"momentum_bits": 32}),
    ("coap_adafactor_8bit", {}),
    ("galore_adamw", {"refresh": "randomized", "moments": "rotate"}),
    ("galore_adamw_8bit", {"proj_type": "full"}),
]


@pytest.mark.slow
def test_columns_may_be_spread(tmp_path: Path) -> None:
    made = run(follow, 3, tmp_path, COLUMNS, [3], 10, True)
    far = {k: gap for k, gap in check(made, COLUMNS, [3]).items() if not gap <= limit(k)}
    assert not far
