"""`lowrank compare` as a command: mistakes, killing and going on, tuning, the estimate."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY

from lowrank.trainers import pretrain
from lowrank.trainers.cli import main

SETTINGS = [
    item
    for item in TINY[TINY.index("--set") + 1 :]
    if not item.startswith(("log.", "checkpoint.", "eval.every"))
]


def arguments(
    corpus: Path, folder: Path, *more: str, methods: str = "adamw,fira_adamw"
) -> list[str]:
    flags = [f"--methods={methods}", f"--data={corpus}", f"--output={folder}", "--steps=60"]
    return ["compare", *flags, *more, "--set", *SETTINGS]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods=galore_adm"], "did you mean 'galore_adamw'"),
        (["--seeds=1,2,1"], "--seeds has 1 twice"),
        (["--steps=2"], "--steps is 2; accepted: 4 or more"),
        (["--jobs=0"], "--jobs is 0; accepted: 1 or more"),
        (["--model=llama_9b"], "did you mean 'llama_9m'"),
        (["--data=/nowhere"], "/nowhere"),
        (["--rates=/nowhere"], "--rates /nowhere"),
        (["--set", "train.batch=3"], "unknown key train.batch"),
        (["--set", "train.seed=3"], "accepted: --seeds"),
        (["--tune", "--set", "optimizer.betas=[0.9,0.9]"], "accepted: --methods NAME+betas=VALUE"),
        (["--tune", "--set", "optimizer.head_lr=0.1"], "--set optimizer.head_lr with --tune"),
        (["--equal=memory", "--methods=adamw,muon+rank=8"], "muon+rank=8: its rank is chosen"),
        (["--methods=adamw+rnk=3"], "adamw+rnk=3: unknown option of adamw 'rnk'"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    more: list[str], said: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    assert main([*arguments(corpus, folder), *more]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not folder.exists()


def test_a_folder_of_something_else_is_left_alone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")
    assert main(arguments(corpus, tmp_path)) == 2
    assert "holds something else than a comparison (mine)" in capsys.readouterr().err
    assert main(arguments(corpus, corpus)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def start(asked: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank.trainers.cli", *asked],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 400
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def losses(folder: Path) -> dict[str, dict[int, float]]:
    content = json.loads((folder / "results.json").read_text())
    return {
        row["method"]: {item["seed"]: item["val_loss"] for item in row["runs"]}
        for row in content["rows"]
    }


def processes_in(folder: Path) -> list[str]:
    """Runs that hold one of the folder's runs, however they were started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


def begun(folder: Path) -> bool:
    """Whether a run has taken some steps and isn't finished."""
    return any(
        path.read_text().count('"train"') > 3 and not (path.parent / "summary.json").exists()
        for path in folder.glob("runs/*/metrics.jsonl")
    )


def lines_in(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("runs/*/metrics.jsonl"))


def finished(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}


@pytest.mark.exhaustive
def test_killed_at_any_moment_a_comparison_goes_on(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "killed"
    asked = arguments(corpus, folder, "--seeds=0,1")
    process = start(asked)
    wait_for(lambda: finished(folder) and begun(folder), process)
    process.kill()
    process.communicate()
    # Its worker sees that nobody is there any more, saves the run at work and ends.
    limit = time.monotonic() + 200
    while processes_in(folder) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not processes_in(folder)
    kept = finished(folder)
    assert kept
    before = lines_in(folder)
    process = start(asked)
    wait_for(lambda: lines_in(folder) > before, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 143, output + errors
    assert f"go on with: lowrank compare --output {folder}" in errors
    assert not processes_in(folder)
    # What a run leaves that is killed between its summary and its clearing up.
    (next(iter(kept)).parent / "checkpoints").mkdir()

    # Nothing but the folder is needed to go on.
    assert main(["compare", "--output", str(folder), "--jobs", "2"]) == 0
    assert "| `fira_adamw` |" in capsys.readouterr().out
    assert {path: finished(folder)[path] for path in kept} == kept
    assert len(finished(folder)) == len(list((folder / "runs").iterdir())) == 4
    assert not list(folder.glob("runs/*/checkpoints"))
    # Each run ends as one that nothing interrupted.
    monkeypatch.setattr(pretrain, "write_report", lambda run: run / "report.html")
    for path in finished(folder):
        alone = tmp_path / "alone" / path.parent.name
        config = path.parent / "config.yaml"
        assert main(["pretrain", f"--config={config}", f"--output={alone}"]) == 0
        left, right = (
            json.loads((one / "summary.json").read_text()) for one in (path.parent, alone)
        )
        assert left["weights_sha256"] == right["weights_sha256"]
        assert left["val_loss"] == right["val_loss"]

    assert set(losses(folder)) == {"adamw", "fira_adamw"}
    lines = list(csv.DictReader((folder / "results.csv").open()))
    for line in lines:
        for name in ("weights", "gradients", "moments", "basis", "other_state"):
            assert line[f"{name}_measured"] == line[f"{name}_predicted"], name
        assert float(line["optimizer_ms"]) > 0
    assert (folder / "report.html").read_text().count("<figure") == 5
    capsys.readouterr()
    assert main([*asked, "--steps=61"]) == 2
    assert "steps 60, not 61" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_rates_are_tuned_on_a_seed_of_their_own(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tuned"
    methods = "adafactor+plain_rule=own+plain_lr=0.01"
    more = ("--seeds=0", "--steps=8", "--tune", "--jobs=2")
    assert main(arguments(corpus, folder, *more, methods=methods)) == 0
    content = json.loads((folder / "results.json").read_text())
    rates = content["rates"][methods]
    assert content["rows"][0]["optimizer"]["lr"] == rates["lr"]
    runs = [json.loads(path.read_text()) for path in finished(folder)]
    tuning = [run["val_loss"] for run in runs if run["seed"] == 100]
    assert len(tuning) == rates["tried"] >= 3
    assert min(tuning) == rates["val_loss"]
    # Written again from what the folder holds.
    before = (folder / "results.json").read_text()
    assert main(["report", str(folder)]) == 0
    assert (folder / "results.json").read_text() == before
    # The time is estimated without a trace in a folder that isn't there.
    other = tmp_path / "other"
    capsys.readouterr()
    assert main(arguments(corpus, other, "--seeds=0,1", "--dry-run")) == 0
    told = capsys.readouterr().out
    assert "adamw: 2 runs, 0:0" in told
    assert "fira_adamw: 2 runs" in told
    assert "in all, 1 at a time; nothing was written" in told
    assert not other.exists()
