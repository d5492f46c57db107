"""Bad inputs of all kinds: one clear line each, and nothing half-written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from bad_files import files
from bad_inputs import DATA, PLACE, RUN, BadInput, settings_and_flags
from tiny_runs import TINY

from lowrank.trainers import loop, pretrain
from lowrank.trainers.cli import main
from lowrank.trainers.compare import command as compare_command

SEED, GENERATED, QUICK = 20261127, 200, 60
#: A line that is longer says more than anyone reads.
LONGEST = 1050


class Accepted(BaseException):
    """Training would have begun."""


def inputs() -> list[BadInput]:
    """All inputs, in an order in which each part has many kinds."""
    found = [*files(), *settings_and_flags(SEED, GENERATED)]
    random.Random(SEED).shuffle(found)
    return found


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = [f"--output={folder}", "--steps=4", "--optimizer=galore_adamw", f"--data={corpus}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_report", lambda folder: folder / "report.html")
        assert main(["pretrain", *flags, *TINY, "checkpoint.every=2"]) == 0
    return folder


def command(item: BadInput, place: Path, corpus: Path, run: Path) -> list[str]:
    given = list(item.arguments)
    if item.tiny:
        flags = [text for text in given if text.startswith("-") or "=" not in text]
        settings = [text for text in given if text not in flags]
        base = ["--steps=1", f"--data={corpus}", f"--output={place}/out"]
        given = ["pretrain", *base, "--optimizer=galore_adamw", *TINY, *settings, *flags]
    names = {PLACE: place, DATA: corpus, RUN: run}
    for mark, folder in names.items():
        given = [text.replace(mark, str(folder)) for text in given]
    return given


def listing(*folders: Path) -> dict[str, bytes | str]:
    """Every file below the folders and what it holds, of odd ones the name alone."""
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else ""
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.name not in (".lock", "report.html")
    }


def fault(
    item: BadInput, place: Path, corpus: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> str | None:
    """What is wrong with how an input is refused; None for nothing."""
    if item.make is not None:
        item.make(place, run)
    before = listing(place, run)
    try:
        status: object = main(command(item, place, corpus, run))
    except SystemExit as end:
        status = end.code
    except Accepted:
        return "was accepted"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    if status not in (1, 2):
        return f"status {status}, {errors[:300]!r}"
    if len(lines) != 1 or not lines[0].startswith("lowrank: ") or "Traceback" in errors:
        return f"{len(lines)} lines: {errors[:600]!r}"
    if not 25 <= len(lines[0]) <= LONGEST:
        return f"{len(lines[0])} characters: {lines[0][:300]!r}"
    after = listing(place, run)
    if after != before:
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        return f"changed {changed[:3]}"
    return None


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 7))]
)
def test_bad_inputs_are_one_line(
    part: int,
    corpus: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise Accepted

    monkeypatch.setattr(loop.Loop, "run", refuse)
    monkeypatch.setattr(compare_command, "open_pool", refuse)
    monkeypatch.setattr(pretrain, "write_report", lambda folder: folder / "report.html")
    monkeypatch.chdir(tmp_path)
    found = []
    chosen = inputs()
    last = len(chosen) if part == 6 else (part + 1) * QUICK
    for number, item in enumerate(chosen[part * QUICK : last]):
        place = tmp_path / str(number)
        place.mkdir()
        wrong = fault(item, place, corpus, finished, capsys)
        if wrong:
            found.append(f"{item}\n    {wrong}")
    assert not found, f"{len(found)} of {last - part * QUICK}:\n" + "\n".join(found)
