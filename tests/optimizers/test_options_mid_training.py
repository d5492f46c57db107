"""No option, shape or dtype in a group or a loaded state reaches a kernel unchecked.

Every option of every method is changed in the middle of training, and every part of a saved state;
`mid_training.py` says how that may end.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from representative import with_representative
from support import tiny_model
from table import TABLE, Row, identifier

NAMES = [identifier(row) for row in TABLE]
#: One of each kind of projector, rule, residual and layer.
REPRESENTATIVE = tuple(
    name
    for name in NAMES
    if name in (*("adafactor", "galore_adamw", "qgalore_adamw_8bit", "relora_adamw"),)
)
OTHERS = tuple(name for name in NAMES if name not in REPRESENTATIVE)


@cache
def verdicts(kind: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """By method (all of them without names), from a process that starts one for each batch."""
    script = Path(__file__).with_name("isolated.py")
    folders = os.pathsep.join([str(script.parent), str(script.parent.parent)])
    # `compile=True` goes its way without minutes of compilation.
    wanted = {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment = {**os.environ, **wanted, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), kind, *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {verdict["name"]: verdict for verdict in found}


def assert_right(verdict: dict[str, Any], least: int) -> None:
    assert verdict["cases"] >= least
    lines = [f"{label}: {said}" for label, said in verdict["wrong"].items()]
    assert not lines, f"{len(lines)} of {verdict['cases']} cases:\n" + "\n".join(lines)


@pytest.mark.parametrize("row", TABLE, ids=identifier)
@pytest.mark.parametrize("how", ["copied", "loaded"])
def test_groups_stay_those_that_were_given(row: Row, how: str) -> None:
    optimizer = row.build(tiny_model())
    options = [group.keys() for group in optimizer.param_groups]
    if how == "copied":
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    assert [group.keys() for group in optimizer.param_groups] == options
    type(optimizer)([{**group} for group in optimizer.param_groups])


@pytest.mark.parametrize("name", with_representative(NAMES, REPRESENTATIVE, marks=()))
def test_common_changes(name: str) -> None:
    names = REPRESENTATIVE if name in REPRESENTATIVE else OTHERS
    assert_right(verdicts("quick", names)[name], least=3)


@pytest.mark.parametrize("name", with_representative(NAMES, REPRESENTATIVE))
def test_each_change(name: str) -> None:
    names = REPRESENTATIVE if name in REPRESENTATIVE else OTHERS
    assert_right(verdicts("all", names)[name], least=100)
