"""Two processes train as one does with the same sequences in a step."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run as run_together
from processes import PRELOAD as PRELOAD
from processes import Job, run_jobs
from test_lost import own_lines
from tiny_runs import comparable_metrics, summary

from lowrank.trainers.config import ModelConfig
from lowrank.trainers.data import Batch
from lowrank.trainers.distributed import World
from lowrank.trainers.models import build_model
from lowrank.trainers.step import clip, compute_gradient
from lowrank.trainers.strategies import replicate

pytestmark = pytest.mark.slow
Tiny = Callable[..., list[str]]
Run = Callable[[list[str]], tuple[int, str, str]]


def torchrun(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node=2", *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            # A safe path has not the script's folder.
            "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1)),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(world: World) -> dict[str, Any]:
    """Three steps on sequences of uneven length, two micro-batches on every process."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = build_model(
        ModelConfig(**shape, num_attention_heads=2, vocab_size=31), 8, 0, world.device
    )
    module = replicate(model, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(5)
    losses, norms = [], []
    for _ in range(3):
        tokens = torch.randint(31, (8, 9), generator=generator)
        targets = tokens[:, 1:].clone()
        for row in range(8):
            targets[row, row + 1 :] = -100
        inputs = tokens[:, :-1].chunk(world.size)[world.rank].chunk(2)
        own = targets.chunk(world.size)[world.rank].chunk(2)
        batches = [Batch(*pair) for pair in zip(inputs, own, strict=True)]
        gradient = compute_gradient(module, batches, world, flag=world.rank > 0)
        assert gradient.flags == world.size - 1
        clip(model.parameters(), gradient.norm, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(gradient.loss)
        norms.append(gradient.norm)
    return {"losses": losses, "norms": norms, "weights": model.network.state_dict()}


def train_in(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return train(World(rank, size, torch.device("cpu")))


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    two = run_together(train_in, 2, tmp_path)[0]
    one = train(World(0, 1, torch.device("cpu")))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_a_run_of_two_processes_resumes_exactly(tiny: Tiny, tmp_path: Path) -> None:
    whole, broken, alone = tmp_path / "whole", tmp_path / "broken", tmp_path / "alone"
    again = tiny(broken, 8, "--resume=auto", "distributed.timeout=30")
    jobs = [
        Job(tiny(whole, 8), 2),
        Job(again, 2, {"1": (5, int(signal.SIGKILL))}),
        Job(again, 2),
        Job(tiny(alone, 1)),
    ]
    first_run, killed, resumed, last = run_jobs(jobs, tmp_path / "jobs")
    for outcome in (first_run, resumed, last):
        assert not any(outcome.statuses), outcome.errors
    assert "".join(first_run.outputs).count("training for") == 1
    assert killed.statuses == [1, -signal.SIGKILL]
    assert killed.seconds < 15
    (told,) = own_lines(killed)
    assert told.startswith("lowrank: rank 1 (")
    assert "resuming at step 4 of 8" in resumed.outputs[0]
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert summary(whole)["processes"] == 2
    assert summary(whole)["tokens"] == 2 * 8 * 2 * 2 * 32

    # The first evaluation is of the same weights on the same text, however many share it.
    first, shared = comparable_metrics(alone)[0], comparable_metrics(whole)[0]
    assert shared["tokens"] == first["tokens"]
    assert shared["val_loss"] == pytest.approx(first["val_loss"], rel=1e-6)
    assert shared["bits_per_byte"] == pytest.approx(first["bits_per_byte"], rel=1e-6)


STOPPED = """
import os, signal, sys
from processes import stop_itself
from lowrank.trainers.cli import main

if os.environ["RANK"] == "1":
    stop_itself(5, signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_ends_the_run_which_one_process_carries_on(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    script, folder, whole = tmp_path / "stopped.py", tmp_path / "run", tmp_path / "whole"
    script.write_text(STOPPED)
    result = torchrun(script, *tiny(folder, 8, "distributed.timeout=10"))
    assert result.returncode == 1
    told = [line for line in result.stderr.splitlines() if line.startswith("lowrank:")]
    assert len(told) == 1, result.stderr
    assert told[0].startswith("lowrank: rank 1 (")
    status, output, errors = run(["pretrain", f"--resume={folder}"])
    assert (status, errors) == (0, "")
    assert "resuming at step 4 of 8 steps of 8 x 32" in output
    run(tiny(whole, 8, "distributed.data_shards=2"))
    expected = [item for item in comparable_metrics(whole) if item["kind"] == "train"]
    found = [item for item in comparable_metrics(folder) if item["kind"] == "train"]
    assert [item["loss"] for item in found] == pytest.approx(
        [item["loss"] for item in expected], abs=1e-5
    )
    assert summary(folder)["tokens"] == summary(whole)["tokens"]
