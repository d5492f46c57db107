"""A short form of the soak; docs/robustness.md has the figures of the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_that_is_ended_again_and_again_ends_as_the_straight_one() -> None:
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(script), "--steps=150", "--faults=6", "--seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["ended by"].values()) >= 4, "the faults came after the run's end"
