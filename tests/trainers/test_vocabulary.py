"""A vocabulary larger than the tokenizer's."""

from collections.abc import Callable
from pathlib import Path

import yaml

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]


def without_vocabulary(arguments: list[str]) -> list[str]:
    return [item for item in arguments if not item.startswith("model.vocab_size")]


def saved_vocabulary(folder: Path) -> int:
    return int(yaml.safe_load((folder / "config.yaml").read_text())["model"]["vocab_size"])


def test_it_becomes_the_tokenizers_by_default(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = without_vocabulary(tiny(folder, 2))
    status, output, errors = run(arguments)
    assert (status, errors) == (0, "")
    assert "vocabulary of 257, all that the tokenizer bytes has, instead of 4,096" in output
    assert saved_vocabulary(folder) == 257
    status, output, errors = run([*arguments, "--resume", str(folder)])
    assert (status, errors) == (0, "")
    assert "instead of" not in output


def test_one_that_was_asked_for_stays_and_is_said(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*without_vocabulary(tiny(folder, 1)), "--set", "model.vocab_size=300"]
    status, output, _ = run(arguments)
    assert status == 0
    assert "model.vocab_size is 300: the tokenizer bytes never uses 43 of them" in output
    assert saved_vocabulary(folder) == 300
