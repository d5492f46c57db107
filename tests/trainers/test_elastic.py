"""Runs that are killed and go on with other numbers of processes and other strategies."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import FULL_SHARDS, FULL_WEIGHTS, Job, Outcome, run_jobs
from processes import PRELOAD as PRELOAD
from test_lost import own_lines
from test_sharded_runs import losses
from tiny_runs import TINY, comparable_metrics, summary, write_corpus

pytestmark = pytest.mark.slow
STEPS = 8
DDP, FSDP2 = "distributed.strategy=auto", "distributed.strategy=fsdp2"
#: Processes and strategy before and after a kill at step 5, of a run with checkpoints at 3 and 4.
CHANGES = {
    "ddp 1 to 2": ((1, DDP), (2, DDP)),
    "ddp 2 to 4": ((2, DDP), (4, DDP)),
    "fsdp2 2 to 1": ((2, FSDP2), (1, FSDP2)),
    "fsdp2 4 to 3": ((4, FSDP2), (3, FSDP2)),
    "fsdp2 to ddp": ((2, FSDP2), (2, DDP)),
}
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(corpus: Path) -> Arguments:
    def made(folder: Path, *more: str) -> list[str]:
        flags = [f"--output={folder}", f"--steps={STEPS}", f"--data={corpus}", "--resume=auto"]
        # 12 sequences a step: 1, 2, 3 or 4 processes share them.
        shape = ("train.accumulation=3", "distributed.data_shards=2", "data.packing=pad")
        return ["pretrain", *flags, *TINY, *shape, "distributed.timeout=30", *more]

    return made


@pytest.fixture(scope="module")
def runs(
    arguments: Arguments, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Outcome]]:
    base = tmp_path_factory.mktemp("runs")
    jobs = [Job(arguments(base / "whole"))]
    for name, ((size, strategy), (size_after, after)) in CHANGES.items():
        killed = {str(size - 1): (5, int(signal.SIGKILL))}
        jobs.append(Job(arguments(base / name, strategy), size, killed))
        jobs.append(Job(arguments(base / name, after), size_after))
    return base, run_jobs(jobs, base / "jobs")


@pytest.mark.parametrize("name", CHANGES)
def test_losses_are_those_of_an_uninterrupted_run(
    name: str, runs: tuple[Path, list[Outcome]]
) -> None:
    base, outcomes = runs
    at = 1 + 2 * list(CHANGES).index(name)
    size = CHANGES[name][0][0]
    assert outcomes[at].statuses == [1] * (size - 1) + [-signal.SIGKILL]
    assert outcomes[at].seconds < 15
    told = own_lines(outcomes[at])
    assert [line[: len("lowrank: rank")] for line in told] == ["lowrank: rank"] * (size > 1), told
    assert not any(outcomes[at + 1].statuses), outcomes[at + 1].errors
    assert outcomes[at + 1].outputs[0].count("resuming at step 4 of 8") == 1
    found, expected = losses(base / name), losses(base / "whole")
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=1e-5)
    for key in ("tokens", "epochs", "unigram_val_loss", "skipped_documents"):
        assert summary(base / name)[key] == summary(base / "whole")[key], key


def test_on_as_many_processes_a_run_goes_on_to_the_bit(
    arguments: Arguments, tmp_path: Path
) -> None:
    killed = {"0": (5, int(signal.SIGKILL))}
    # While the checkpoint of step 6 is written, by either process: it must not be picked.
    written = [{rank: (-6, int(signal.SIGKILL))} for rank in ("0", "1")]
    folder = tmp_path / "broken"
    jobs = [
        Job(arguments(tmp_path / "whole", FSDP2), 2),
        *(Job(arguments(folder, FSDP2), 2, stop) for stop in (killed, *written)),
        Job(arguments(folder, FSDP2), 2),
    ]
    outcomes = run_jobs(jobs, tmp_path / "jobs")
    for outcome in outcomes[2:]:
        assert "resuming at step 4 of 8" in outcome.outputs[0]
    assert [sorted(item.statuses) for item in outcomes[1:4]] == [[-signal.SIGKILL, 1]] * 3
    assert outcomes[4].statuses == [0, 0]
    assert comparable_metrics(folder) == comparable_metrics(tmp_path / "whole")
    assert summary(folder)["weights_sha256"] == summary(tmp_path / "whole")["weights_sha256"]
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {"step-00000006", "step-00000008"}


def test_a_full_disk_is_told_once_and_leaves_the_former_checkpoint(
    arguments: Arguments, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    jobs = [
        Job(arguments(folder, FSDP2), 2, {"0": (5, int(signal.SIGKILL))}),
        Job(arguments(folder, FSDP2), 2, {"1": (-6, FULL_SHARDS)}),
        Job(arguments(folder, FSDP2), 2, {"0": (-6, FULL_WEIGHTS)}),
        Job(arguments(folder, FSDP2), 2),
    ]
    _, shards, weights, last = run_jobs(jobs, tmp_path / "jobs")
    for outcome, why in (
        (shards, "No space left on device on rank 1"),
        (weights, "model.safetensors: No space left on device"),
    ):
        assert outcome.statuses == [1, 1], outcome.errors
        told = [line for error in outcome.errors for line in error.splitlines()]
        assert len(told) == 1, told
        assert f"step-00000006 can't be written ({why}); the last whole one is" in told[0]
    assert "resuming at step 4 of 8" in last.outputs[0]
    assert last.statuses == [0, 0]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-00000006",
        "step-00000008",
    }


def test_a_run_that_left_no_checkpoint_starts_afresh_with_its_batch(
    arguments: Arguments, tmp_path: Path
) -> None:
    stop = {"0": (2, int(signal.SIGKILL))}
    shared = [item for item in arguments(tmp_path / "run", "train.accumulation=2")]
    shared.remove("distributed.data_shards=2")
    jobs = [Job(shared, 2, stop), Job(shared, 1)]
    first, second = run_jobs(jobs, tmp_path / "jobs")
    assert "training for 8 steps of 8 x" in first.outputs[0]
    assert "training for 8 steps of 8 x" in second.outputs[0]
    assert second.statuses == [0]


def test_processes_in_folders_of_their_own_write_one_run(
    arguments: Arguments, corpus: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(corpus, folders[0] / "texts")
    write_corpus(folders[1] / "texts", documents=50)
    places = tuple(map(str, folders))
    again = ["pretrain", "--resume=run/checkpoints/step-00000006"]
    jobs = [
        Job(arguments(Path("run"), FSDP2), 2, folders=places),
        Job(again, 2, folders=places),
        # The same name, and other texts in the second folder.
        Job(arguments(Path("other"), "data.source=texts"), 2, folders=places),
    ]
    first, second, other = run_jobs(jobs, tmp_path / "jobs")
    assert first.statuses == second.statuses == [0, 0], (first.errors, second.errors)
    assert "resuming at step 6" in second.outputs[0]
    assert summary(folders[0] / "run")["strategy"] == "fsdp2"
    assert {path.name for path in folders[1].iterdir()} == {"texts"}
    assert other.statuses == [2, 2]
    assert [line for error in other.errors for line in error.splitlines()] == [
        "lowrank: rank 1 and rank 0 have different data for data.source 'texts'; every machine"
        " needs the same"
    ]


def test_projected_gradients_train_alike_and_go_on(arguments: Arguments, tmp_path: Path) -> None:
    low = ("distributed.low_rank_gradients=true", "train.clip=0")
    folder = tmp_path / "low"
    jobs = [
        Job(arguments(tmp_path / "whole", "train.clip=0")),
        Job(arguments(folder, *low), 2, {"1": (5, int(signal.SIGKILL))}),
        Job(arguments(folder, *low), 2),
        Job(arguments(tmp_path / "fira", *low, "optimizer.name=fira_adamw"), 2),
    ]
    _, _, resumed, fira = run_jobs(jobs, tmp_path / "jobs")
    assert "resuming at step 4 of 8" in resumed.outputs[0]
    assert resumed.statuses == [0, 0], resumed.errors
    found, expected = losses(folder), losses(tmp_path / "whole")
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=1e-5)
    assert fira.statuses == [2, 2]
    told = [line for error in fira.errors for line in error.splitlines()]
    assert len(told) == 1, told
    assert "FiraAdamW has no matrix whose projected gradient could travel" in told[0]
