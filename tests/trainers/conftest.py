"""Fixtures for tiny runs of the real command."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import TINY, write_corpus

from lowrank.trainers import pretrain
from lowrank.trainers.cli import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(corpus: Path) -> Callable[..., list[str]]:
    """The arguments of a tiny run; further ones may be flags or section.key=value."""

    def arguments(
        output: Path, steps: int = 10, *more: str, optimizer: str = "galore_adamw"
    ) -> list[str]:
        flags = [item for item in more if item.startswith("--")]
        settings = [item for item in more if not item.startswith("--")]
        return [
            "pretrain",
            f"--output={output}",
            f"--steps={steps}",
            f"--optimizer={optimizer}",
            f"--data={corpus}",
            *flags,
            *TINY,
            *settings,
        ]

    return arguments


@pytest.fixture
def whole_run(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs the command in this process: (exit status, standard output, standard error)."""

    def runner(arguments: list[str]) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return runner


@pytest.fixture
def run(
    whole_run: Callable[[list[str]], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], tuple[int, str, str]]:
    """The same without drawing the report, which takes longer than a tiny run."""
    monkeypatch.setattr(pretrain, "write_report", lambda folder: folder / "report.html")
    return whole_run
