"""Killed at any moment and resumed, a run ends as if it had run through, to the bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from representative import with_representative
from tiny_runs import comparable_metrics, summary

pytestmark = pytest.mark.slow
STEPS = 24


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank.trainers.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output + errors


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> bool:
    """Waits in small steps; False when the process ended first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return condition()


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(
        name.startswith(".writing-") for name in os.listdir(checkpoints)
    )


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def uninterrupted(
    straight: dict[str, Path], optimizer: str, tiny: Callable[..., list[str]], folder: Path
) -> Path:
    """One straight run for each optimizer, shared by the tests."""
    if optimizer not in straight:
        finish(start(tiny(folder / "straight", STEPS, optimizer=optimizer)))
        straight[optimizer] = folder / "straight"
    return straight[optimizer]


def assert_equal_runs(one: Path, other: Path) -> None:
    assert comparable_metrics(one) == comparable_metrics(other)
    left, right = summary(one), summary(other)
    assert left["weights_sha256"] == right["weights_sha256"]
    timed = {"wall_seconds", "tokens_per_second", "peak_memory_bytes"}
    assert {k: v for k, v in left.items() if k not in timed} == {
        k: v for k, v in right.items() if k not in timed
    }


@pytest.mark.parametrize(
    "optimizer",
    with_representative(("galore_adamw", "galore_adamw_8bit"), ()),
)
def test_killed_at_random_steps(
    optimizer: str, tiny: Callable[..., list[str]], tmp_path: Path, straight: dict[str, Path]
) -> None:
    whole = uninterrupted(straight, optimizer, tiny, tmp_path)
    folder = tmp_path / "killed"
    arguments = tiny(folder, STEPS, "--resume=auto", optimizer=optimizer)
    moments = random.Random(optimizer)
    for limit in sorted(moments.sample(range(1, 34), 2)):
        process = start(arguments)
        if wait_for(lambda limit=limit: lines(folder) >= limit, process):
            kill(process)
    finish(start(arguments))
    assert_equal_runs(whole, folder)


@pytest.mark.exhaustive
def test_killed_while_a_checkpoint_is_written(
    tiny: Callable[..., list[str]], tmp_path: Path, straight: dict[str, Path]
) -> None:
    whole = uninterrupted(straight, "galore_adamw", tiny, tmp_path)
    folder = tmp_path / "killed"
    arguments = tiny(folder, STEPS, "--resume=auto")
    caught = 0
    for _ in range(3):
        process = start(arguments)
        if wait_for(lambda: writing(folder), process):
            kill(process)
            caught += writing(folder)
    assert caught > 0, "no kill fell into the writing of a checkpoint"
    finish(start(arguments))
    assert_equal_runs(whole, folder)
    assert not writing(folder)


@pytest.mark.exhaustive
def test_terminated_run_saves_itself_and_says_how_to_go_on(
    tiny: Callable[..., list[str]], tmp_path: Path, straight: dict[str, Path]
) -> None:
    whole = uninterrupted(straight, "galore_adamw", tiny, tmp_path)
    folder = tmp_path / "terminated"
    process = start(tiny(folder, STEPS))
    assert wait_for(lambda: lines(folder) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"--resume {folder}" in errors
    assert len(errors.strip().splitlines()) == 1
    # The settings come from the folder; nothing has to be said again.
    resumed = [sys.executable, "-m", "lowrank.trainers.cli", "pretrain", "--resume", str(folder)]
    subprocess.run(
        resumed, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )
    assert_equal_runs(whole, folder)
