"""The command under DeepSpeed's ZeRO on two processes: runs, their folders, and going on."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from processes import FULL_PARTITION, NOT_FINITE, SPIKE, Job, Outcome, run_jobs
from safetensors.torch import load_file
from test_lost import own_lines
from test_sharded_runs import losses
from tiny_runs import TINY, comparable_metrics, summary

from lowrank.trainers.agreement import check_partitions
from lowrank.trainers.checkpoint import verify
from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.parts import saved_config

pytestmark = pytest.mark.slow
PRELOAD = (*processes.PRELOAD, "deepspeed")
pytest.importorskip("deepspeed")

STEPS, SAVED = 8, 4
STAGES = (1, 2, 3)
ZERO = "distributed.strategy=deepspeed"


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """One process, two at each stage, and some that go on from the middle of the latter."""
    base = tmp_path_factory.mktemp("runs")

    def arguments(name: str, *more: str) -> list[str]:
        flags = [f"--output={base / name}", f"--steps={STEPS}", f"--data={corpus}"]
        settings = ("checkpoint.keep=9", f"checkpoint.every={SAVED}", "train.clip=0.5")
        return ["pretrain", *flags, *TINY, *settings, *more]

    def again(name: str, source: str, processes: int, *more: str) -> Job:
        saved = base / name / "checkpoints" / "step-00000004"
        copied = (str(base / source), str(base / name))
        return Job(["pretrain", f"--resume={saved}", *more], processes, copied=copied)

    jobs = {"one": Job(arguments("one", "distributed.data_shards=2"))}
    for stage in STAGES:
        name, settings = f"stage {stage}", (ZERO, f"distributed.zero_stage={stage}")
        if stage == 3:
            settings += ("model.activation_checkpointing=true",)
        jobs[name] = Job(arguments(name, *settings), 2)
        if stage == 3:  # of stage 2 a killed run does
            jobs["resumed 3"] = again("resumed 3", name, 2)
    jobs["bfloat16"] = Job(arguments("bfloat16", ZERO, "model.dtype=bfloat16"), 2)
    jobs["resumed bfloat16"] = again("resumed bfloat16", "bfloat16", 2)
    for name, (source, size, *changed) in CHANGED.items():
        jobs[name] = again(name, source, size, *(("--set", *changed) if changed else ()))
    full = {"1": (-SAVED, FULL_PARTITION)}
    jobs["full"] = Job(arguments("full", ZERO), 2, stop=full)
    settings = (ZERO, "distributed.zero_stage=2", "distributed.timeout=30")
    jobs["killed"] = Job(
        arguments("killed", *settings), 2, stop={"1": (SAVED + 1, int(signal.SIGKILL))}
    )
    for name, size, stage in (("killed, again", 2, 2), ("killed, on four", 4, 1)):
        settings = (ZERO, f"distributed.zero_stage={stage}")
        auto = ["pretrain", "--resume=auto", *arguments(name, *settings)[1:]]
        jobs[name] = Job(auto, size, copied=(str(base / "killed"), str(base / name)))
    quantised = ("optimizer.name=qgalore_adamw_8bit", "model.weight_bits=8")
    jobs["quantised"] = Job(arguments("quantised", ZERO, *quantised), 2)
    outcomes = dict(zip(jobs, run_jobs(list(jobs.values()), base / "jobs"), strict=True))
    for name in jobs:
        if name not in (*REFUSED, "full", "killed"):
            assert not any(outcomes[name].statuses), (name, "\n".join(outcomes[name].errors))
    return base, outcomes


#: By name of the run: from which one it goes on, on how many processes, and changed settings.
CHANGED = {
    "2 to 1": ("stage 2", 1),
    "1 to 3": ("one", 2, ZERO, "distributed.zero_stage=3"),
    "3 to fsdp2": ("stage 3", 2, "distributed.strategy=fsdp2", "distributed.zero_stage=1"),
}
#: By name of the run: what its one line says.
REFUSED = {
    "quantised": "distributed.strategy='deepspeed' with optimizer.name='qgalore_adamw_8bit' and",
}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_follow_one(stage: int, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, outcomes = runs
    name = f"stage {stage}"
    found, expected = losses(base / name), losses(base / "one")
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=1e-5)
    one, two = comparable_metrics(base / "one"), comparable_metrics(base / name)
    assert [item["kind"] for item in two] == [item["kind"] for item in one]
    skipped = [(SPIKE + 1, "spike"), (NOT_FINITE + 1, "nan_gradient")]
    for run in (one, two):
        told = [(item["step"], item["reason"]) for item in run if item["kind"] == "skip"]
        assert told == skipped
    for key in ("grad_norm", "lr"):
        values = [
            [
                item[key]
                for item in run
                if item["kind"] == "train" and item["step"] != NOT_FINITE + 1
            ]
            for run in (two, one)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key
    alone, shared = summary(base / "one"), summary(base / name)
    assert shared["strategy"] == "deepspeed"
    for key in ("parameters", "tokens", "skipped_steps", "weight_bytes"):
        assert shared[key] == alone[key], key
    assert (alone["state_processes"], shared["state_processes"]) == (1, 2)
    for key in ("optimizer_state_bytes", "adamw_state_bytes"):
        assert 0.4 < shared[key] / alone[key] < 0.7, key
    assert f"2 processes (deepspeed, zero_stage {stage})" in outcomes[name].outputs[0]
    assert outcomes[name].outputs[1] == ""
    assert outcomes[name].errors == ["", ""]


@pytest.mark.parametrize("name", ["3", "bfloat16"])
def test_a_run_goes_on_exactly(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs
    straight = base / (name if name == "bfloat16" else f"stage {name}")
    resumed = base / f"resumed {name}"
    assert comparable_metrics(resumed) == comparable_metrics(straight)
    assert summary(resumed)["weights_sha256"] == summary(straight)["weights_sha256"]


@pytest.mark.parametrize("name", [*CHANGED, "killed, on four"])
def test_other_processes_and_stages_go_on(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, outcomes = runs
    assert f"resuming at step {SAVED} of {STEPS}" in outcomes[name].outputs[0]
    found, expected = losses(base / name), losses(base / "one")
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=1e-5)
    assert summary(base / name)["tokens"] == summary(base / "one")["tokens"]


def test_an_earlier_version_has_not_said_how_it_divided(
    runs: tuple[Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    base, _ = runs
    saved = tmp_path / "saved"
    shutil.copytree(base / "stage 1" / "checkpoints" / "step-00000004", saved)
    for path in saved.glob("zero-*.pt"):
        content = torch.load(path, weights_only=True)
        del content["base_optimizer_state"]["zero_partition"]
        torch.save(content, path)
    config = from_mapping(saved_config(saved))
    check_partitions(saved, config, 2)
    message = (
        "was written by 2 processes with distributed.strategy=deepspeed and"
        " distributed.zero_stage=1, in an earlier version that doesn't say how it is divided, and"
        " the run goes on with 1 process without DeepSpeed; accepted: 2 processes with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_partitions(saved, config, 1)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_whole(stage: int, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs
    saved = base / f"stage {stage}" / "checkpoints" / f"step-{STEPS:08d}"
    verify(saved)
    names = json.loads((saved / "manifest.json").read_text())["files"].keys()
    parts = [name for name in names if name.startswith("zero-")]
    assert sorted(parts) == ["zero-00000-of-00002.pt", "zero-00001-of-00002.pt"]
    for name in parts:
        torch.load(saved / name, weights_only=True)
    weights = load_file(saved / "model.safetensors")
    one = load_file(base / "one" / "checkpoints" / saved.name / "model.safetensors")
    assert weights.keys() == one.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_holds_a_part(stage: int, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs

    def memory(name: str) -> dict[str, int]:
        lines = (base / name / "metrics.jsonl").read_text().splitlines()
        found: dict[str, int] = next(
            item["memory"] for item in map(json.loads, lines) if item["kind"] == "train"
        )
        return found

    alone, shared = memory("one"), memory(f"stage {stage}")
    assert 0.4 < shared["moments"] / alone["moments"] < 0.6
    # The whole weights, or half of them and the kept ones, and the engine's own half.
    assert 1.0 < shared["weights"] / alone["weights"] < (1.6 if stage < 3 else 1.5)
    assert 0.4 < shared["gradients"] / alone["gradients"] < 2


def test_a_full_disk_on_one_process_ends_all_without_a_checkpoint(
    runs: tuple[Path, dict[str, Outcome]],
) -> None:
    base, outcomes = runs
    assert 0 not in outcomes["full"].statuses
    told = [line for error in outcomes["full"].errors for line in error.splitlines()]
    assert len(told) == 1, told
    assert "zero-00001-of-00002.pt: No space left on device on rank 1" in told[0]
    assert not list((base / "full").glob("checkpoints/*"))


def test_a_killed_process_is_told_and_the_run_goes_on(
    runs: tuple[Path, dict[str, Outcome]],
) -> None:
    base, outcomes = runs
    killed, again = outcomes["killed"], outcomes["killed, again"]
    assert killed.statuses == [1, -signal.SIGKILL]
    assert killed.seconds < 15
    (told,) = own_lines(killed)
    assert told.startswith("lowrank: rank 1 (")
    assert f"resuming at step {SAVED} of {STEPS}" in again.outputs[0]
    assert losses(base / "killed, again") == losses(base / "stage 2")
    found, expected = (summary(base / name) for name in ("killed, again", "stage 2"))
    assert found["weights_sha256"] == expected["weights_sha256"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_told_once(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, outcomes = runs
    assert set(outcomes[name].statuses) == {2}
    told = [line for error in outcomes[name].errors for line in error.splitlines()]
    assert len(told) == 1, told
    assert REFUSED[name] in told[0]
    assert name != "quantised" or not (base / name).exists()
