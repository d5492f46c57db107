"""Methods that replace layers on two processes, under FSDP2 and DeepSpeed: runs and going on."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from processes import Job, Outcome, run_jobs
from safetensors.torch import load_file
from test_sharded_runs import losses
from tiny_runs import TINY, comparable_metrics, summary

from lowrank.trainers.parts import LAYERS

pytestmark = pytest.mark.slow
PRELOAD = (*processes.PRELOAD, "deepspeed")

STEPS, SAVED = 6, 3
ZERO, FSDP2 = "distributed.strategy=deepspeed", "distributed.strategy=fsdp2"
RELORA = ("optimizer.name=relora_adamw", "optimizer.alpha=8", "optimizer.update_proj_gap=2")
LOQT = ("optimizer.name=loqt_adamw", "optimizer.basis_format=null", "optimizer.update_proj_gap=2")
SST = ("optimizer.name=sst_adamw", "optimizer.update_proj_gap=2", "model.dtype=bfloat16")
#: By name: the method, and how it is divided.
RUNS = {
    "relora fsdp2": (RELORA, (FSDP2,)),
    "relora zero 3": (RELORA, (ZERO, "distributed.zero_stage=3")),
    "loqt zero 2": (LOQT, (ZERO, "distributed.zero_stage=2")),
    "sst fsdp2": (SST, (FSDP2,)),
}
#: By name: how a run on its third step goes on, if not as it began.
OTHERWISE = {
    "relora fsdp2 alone": ("relora fsdp2", 1),
    "relora zero 3 alone": ("relora zero 3", 1),
    "loqt zero 2 alone": ("loqt zero 2", 1),
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    pytest.importorskip("deepspeed")
    base = tmp_path_factory.mktemp("runs")

    def arguments(name: str, *more: str) -> list[str]:
        flags = [f"--output={base / name}", f"--steps={STEPS}", f"--data={corpus}"]
        settings = ("checkpoint.keep=9", f"checkpoint.every={SAVED}", "distributed.data_shards=2")
        return ["pretrain", *flags, *TINY, *settings, *more]

    def again(name: str, source: str, processes: int) -> Job:
        saved = base / name / "checkpoints" / f"step-{SAVED:08d}"
        copied = (str(base / source), str(base / name))
        return Job(["pretrain", f"--resume={saved}"], processes, copied=copied)

    alone = {"relora": RELORA, "loqt": LOQT, "sst": SST}
    jobs = {name: Job(arguments(name, *method)) for name, method in alone.items()}
    for name, (method, strategy) in RUNS.items():
        jobs[name] = Job(arguments(name, *method, *strategy), 2)
        jobs[f"{name} again"] = again(f"{name} again", name, 2)
    for name, (source, count) in OTHERWISE.items():
        jobs[name] = again(name, source, count)
    outcomes = dict(zip(jobs, run_jobs(list(jobs.values()), base / "jobs"), strict=True))
    for name, outcome in outcomes.items():
        assert not any(outcome.statuses), (name, "\n".join(outcome.errors))
    return base, outcomes


@pytest.mark.parametrize("name", [*RUNS, *OTHERWISE])
def test_losses_are_those_of_one_process(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs
    found, expected = losses(base / name), losses(base / name.split()[0])
    # A bfloat16 has steps of 2^-8 of its value; a last bit may flip a code of LoQT's four bits.
    limit = {"sst": 1e-3, "loqt": 1e-4}.get(name.split()[0], 1e-5)
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=limit)
    events = [
        [
            (item["name"], item["step"])
            for item in comparable_metrics(base / each)
            if item["kind"] == "event"
        ]
        for each in (name, name.split()[0])
    ]
    assert events[0] == events[1]
    assert events[0]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_exactly(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, outcomes = runs
    again = f"{name} again"
    assert f"resuming at step {SAVED} of {STEPS}" in outcomes[again].outputs[0]
    assert comparable_metrics(base / again) == comparable_metrics(base / name)
    assert summary(base / again)["weights_sha256"] == summary(base / name)["weights_sha256"]


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_dense_and_whole(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs
    one, two = (
        base / each / "checkpoints" / f"step-{STEPS:08d}" for each in (name.split()[0], name)
    )
    for file in ("model.safetensors", LAYERS):
        wanted, found = load_file(one / file), load_file(two / file)
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert value.shape == found[key].shape, key
            if file != LAYERS:
                far = float((value.float() - found[key].float()).norm() / value.float().norm())
                flipped = 2e-2 if name.startswith("loqt") else 1e-3
                assert far < (2**-8 if value.dtype is torch.bfloat16 else flipped), key
