import argparse
import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from support import ROOT

from lowrank.optimizers import available
from lowrank.trainers import loop
from lowrank.trainers import pretrain as pretrain_module
from lowrank.trainers.cli import main, parser
from lowrank.trainers.distributed import choose_device

Run = Callable[[list[str]], tuple[int, str, str]]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lowrank.trainers.cli import parser; text = parser().format_help();"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'rich', 'yaml'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy or 'pretrain' not in text else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command", [[], ["pretrain"], ["plan"], ["compress"], ["report"], ["methods"]]
)
def test_help_of_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "usage: lowrank" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=llama_8m"], "model.name is 'llama_8m'; did you mean 'llama_9m'?"),
        (["--optimizer=galore_adam"], "galore_adamw"),
        (["--set", "train.stepz=3"], "unknown key train.stepz; did you mean 'steps'?"),
        (["--set", "optimizer.rnk=3"], "did you mean 'rank'?"),
        (["--set", "steps=3"], "section.key=value"),
        (["--steps=0"], "train.steps is 0"),
        (["--device=cuda:99"], "cuda"),
        (["--device=tpu"], "train.device is 'tpu'"),
        (["--data=nowhere"], "nowhere"),
        (["--config=nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["--set", "model.vocab_size=100", "data.tokenizer=bytes"], "vocab"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_two(
    arguments: list[str],
    message: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(["pretrain", *arguments])
    assert status == 2
    assert errors.startswith("lowrank: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list((tmp_path / "runs").glob("*"))


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The command line's and those of its subcommands."""
    waiting: list[argparse.ArgumentParser] = [parser()]
    while waiting:
        found = waiting.pop()
        yield found
        for action in found._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


def test_flags_are_written_out() -> None:
    found = list(parsers())
    assert len(found) == 7
    assert [one.prog for one in found if one.allow_abbrev] == []
    scanned = 0
    for path in (
        p for folder in ("scripts", "tests", "docs") for p in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                scanned += 1
                assert "allow_abbrev=False" in ast.unparse(node), path
    assert scanned >= 6


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--opt", "adamw"],
        ["plan", "--opt=adamw"],
        ["compare", "--method", "adamw,fira_adamw", "--dry-run"],
        ["compress", "somewhere", "--out", "there", "--reduction=0.5"],
        ["methods", "--mark"],
    ],
)
def test_abbreviated_flags_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    errors = capsys.readouterr().err
    assert (end.value.code, errors.count("\n")) == (2, 1)
    assert "usage" in errors


def test_layers_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The flags beat the file, --set beats the flags."""
    seen: list[pretrain_module.Request] = []

    def note(request: pretrain_module.Request, console: object) -> None:
        seen.append(request)

    monkeypatch.setattr(pretrain_module, "pretrain", note)
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 1, clip: 2.0, seed: 3}\noptimizer: {lr: 1e-4}\n")
    arguments = ["pretrain", f"--config={path}", "--steps=5", "--seed=6", "--set", "train.seed=7"]
    assert run([*arguments, "optimizer.rank=9", "--set", "eval.every=2"])[0] == 0
    assert seen[0].settings == {
        "train": {"steps": 5, "clip": 2.0, "seed": 7},
        "optimizer": {"lr": 1e-4, "rank": 9},
        "eval": {"every": 2},
    }


def test_interrupt_is_tidy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(request: object, console: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_module, "pretrain", interrupt)
    status, _, errors = run(["pretrain"])
    assert status == 130
    assert errors.count("\n") == 1


def test_unforeseen_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: object, console: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(pretrain_module, "pretrain", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["pretrain"])


CUDA = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB"
HOST = (
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"
    " allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), "(tried to allocate 1.50 GiB)"),
        (RuntimeError(HOST), "(tried to allocate 8589934592 bytes)"),
        (MemoryError(), "(MemoryError)"),
    ],
    ids=["device", "host", "Python"],
)
@pytest.mark.parametrize("command", ["pretrain", "plan"])
def test_out_of_memory_is_one_line(
    command: str, error: Exception, asked: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank.trainers import plan
    from lowrank.trainers.plan import truth

    def fail(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(pretrain_module, "pretrain", fail)
    monkeypatch.setattr(plan, "plan", lambda *_, **__: None)
    monkeypatch.setattr(truth, "measured", fail)
    status, output, errors = run([command, *(["--measure"] if command == "plan" else [])])
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("lowrank: there is not enough memory; `lowrank plan` says what fits")
    assert errors.endswith(f"{asked}\n")


def test_a_run_out_of_memory_can_be_resumed(
    tiny: Callable[..., list[str]], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = loop.compute_gradient, []

    def short(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(CUDA)
        return compute(*arguments, **options)

    monkeypatch.setattr(loop, "compute_gradient", short)
    arguments = tiny(tmp_path / "run", 5, "--resume=auto", "checkpoint.every=2")
    status, _, errors = run(arguments)
    assert (status, errors.count("\n")) == (1, 1)
    assert "tried to allocate 1.50 GiB" in errors
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(arguments)[0] == 0
    assert len(calls) == 4 + 3  # from step 2 on


def test_methods_lists_every_optimizer(run: Run) -> None:
    status, output, _ = run(["methods", "--system"])
    assert status == 0
    assert set(available()) <= set(output.split())
    assert "torch" in output


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="accepted: auto, cpu, cuda"):
        choose_device("meta")


@pytest.mark.slow
def test_the_installed_command_runs(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("lowrank")
    result = subprocess.run(
        [command, *tiny(tmp_path / "run", 2)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_runs_as_a_program_as_torchrun_starts_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lowrank", "methods"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lowrank.trainers.cli", run_name="__main__")
    assert ended.value.code == 0
    assert "galore_adamw" in capsys.readouterr().out
