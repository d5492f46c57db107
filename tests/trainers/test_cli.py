import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank.optimizers import available
from lowrank.trainers import pretrain as pretrain_module
from lowrank.trainers.cli import main
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
