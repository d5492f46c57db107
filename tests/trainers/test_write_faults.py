"""Every call that writes a checkpoint fails in turn: what is left can always be gone on from."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from faults import DEATH, DIED, POWER, Call, Disk, in_a_child
from tiny_runs import TINY, comparable_metrics, summary, write_corpus

from lowrank.trainers import pretrain
from lowrank.trainers.checkpoint import CheckpointError, CheckpointStore, verify
from lowrank.trainers.cli import main

STEPS, NAME = 8, "qgalore_adamw_8bit"
#: The step whose checkpoint is disturbed, and those that are there before it and after it.
DISTURBED, BEFORE, AFTER = 6, (2, 4), (4, 6)
#: Every so many of the calls fail in the quick tests.
SAMPLED = 8
KINDS = {"no space": errno.ENOSPC, "I/O error": errno.EIO, "death": DEATH, "power cut": POWER}


class Stopped(BaseException):
    """Ends the run before the checkpoint that the tests write themselves."""


@dataclass
class Scene:
    """A run before the checkpoint of step `DISTURBED`, and that checkpoint's writing.

    Attributes:
        folder: the run's, as the last checkpoint but this one left it.
        save: writes the checkpoint into a copy of that folder.
        calls: of an undisturbed save.
        manifest: what the undisturbed save leaves, by file.
        arguments: of the command, without the output.
        whole: the folder of the run that nothing disturbed.
    """

    folder: Path
    save: Callable[[Path], Path]
    calls: list[Call]
    manifest: str
    arguments: list[str]
    whole: Path


def store_at(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep=2, keep_best=False)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    base = tmp_path_factory.mktemp("faults")
    corpus = write_corpus(base / "corpus")
    settings = ("checkpoint.every=2", "checkpoint.keep=2", "checkpoint.best=false", "eval.every=0")
    flags = [f"--steps={STEPS}", f"--optimizer={NAME}", f"--data={corpus}"]
    arguments = ["pretrain", *flags, *TINY, *settings]
    folder, whole = base / "run", base / "whole"
    held: list[Callable[[Path], Path]] = []
    plain = CheckpointStore.save

    def stop(
        self: CheckpointStore, step: int, loss: float | None, write: Callable[[Path], None]
    ) -> Path:
        if step == DISTURBED:
            held.append(lambda place: plain(store_at(place), step, loss, write))
            raise Stopped
        return plain(self, step, loss, write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_report", lambda folder: folder / "report.html")
        assert main([*arguments, f"--output={whole}"]) == 0
        patch.setattr(CheckpointStore, "save", stop)
        with pytest.raises(Stopped):
            main([*arguments, f"--output={folder}"])
    assert steps_of(folder) == list(BEFORE)
    copy = shutil.copytree(folder, base / "undisturbed")
    with Disk(copy / "checkpoints").watched() as disk:
        saved = held[0](copy)
    assert steps_of(copy) == list(AFTER)
    return Scene(
        folder, held[0], disk.calls, (saved / "manifest.json").read_text(), arguments, whole
    )


def steps_of(folder: Path) -> list[int]:
    """The steps of the checkpoints, every one of which must be whole."""
    return sorted(verify(path).step for path in store_at(folder).folders())


def distinct(calls: list[Call]) -> list[int]:
    """The numbers of the calls that fail: all of them, but of a file's writes the first, the last
    and one between."""
    places: dict[Call, list[int]] = {}
    for number, call in enumerate(calls):
        places.setdefault(call, []).append(number)
    return sorted({at[n] for at in places.values() for n in (0, len(at) // 2, -1)})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def disturbed(scene: Scene, folder: Path, fail_at: int, kind: int | str) -> str:
    """Writes the checkpoint with one fault; the error's text, "" without one."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with Disk(folder / "checkpoints", fail_at, kind).watched():
                scene.save(folder)
        except CheckpointError as error:
            return str(error)
    return " ".join(str(item.message) for item in told)


def test_a_checkpoints_calls_are_all_seen(scene: Scene) -> None:
    made = f".writing-step-{DISTURBED:08d}"
    written = {Path(call.path).name for call in scene.calls if call.name == "write"}
    files = set(json.loads(scene.manifest)["files"])
    assert files <= written, "a file is written by calls that can't be made to fail"
    calls = [(call.name, call.path) for call in scene.calls]
    flushed = {path for name, path in calls if name == "fsync"}
    assert {f"{made}/{file}" for file in files} <= flushed
    published = calls.index(("rename", made))
    last_write = max(at for at, (name, _) in enumerate(calls) if name == "write")
    assert max(at for at, (_, path) in enumerate(calls) if path.startswith(f"{made}/")) < published
    assert last_write < published
    # Renamed, and the new name flushed, before an old one goes.
    removed = calls.index(("rename", f"step-{BEFORE[0]:08d}"))
    assert calls.index(("fsync", "."), published) < removed


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, SAMPLED))]
)
def test_any_fault_leaves_whole_checkpoints(
    name: str, part: int, scene: Scene, tmp_path: Path
) -> None:
    kind = KINDS[name]
    before = contents(scene.folder / "checkpoints")
    errors = quiet = 0
    for at in distinct(scene.calls)[part::SAMPLED]:
        call = scene.calls[at]
        folder = shutil.copytree(scene.folder, tmp_path / str(at))
        if isinstance(kind, str):
            assert in_a_child(partial(disturbed, scene, folder, at, kind)) == DIED, call
        else:
            text = disturbed(scene, folder, at, kind)
            errors, quiet = errors + bool(text), quiet + (not text)
            if text:
                assert "\n" not in text
                assert str(folder / "checkpoints") in text, (call, text)
        left = steps_of(folder)
        assert left in (list(BEFORE), [*BEFORE, DISTURBED], list(AFTER)), (call, left)
        now = contents(folder / "checkpoints")
        for step in set(BEFORE) & set(left):
            prefix = f"step-{step:08d}/"
            assert {k: v for k, v in now.items() if k.startswith(prefix)} == {
                k: v for k, v in before.items() if k.startswith(prefix)
            }
        if not isinstance(kind, str):
            assert not [path for path in now if path.startswith(".writing")], call
        again = scene.save(folder)
        assert steps_of(folder) == list(AFTER), call
        assert (again / "manifest.json").read_text() == scene.manifest
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == [f"step-{step:08d}" for step in AFTER]
        shutil.rmtree(folder)
    assert isinstance(kind, str) or errors > 0


MADE = f".writing-step-{DISTURBED:08d}"
#: A call of each part of a checkpoint's writing, by name and path.
PLACES = {
    "the weights": ("write", f"{MADE}/model.safetensors"),
    "the counters": ("write", f"{MADE}/trainer.pt"),
    "the manifest's name": ("replace", f"{MADE}/.manifest.json"),
    "its own name": ("rename", MADE),
    "the name's flush": ("fsync", "."),
    "an old one's removal": ("rename", f"step-{BEFORE[0]:08d}"),
    "an old one's files": ("rmdir", f".discarded-step-{BEFORE[0]:08d}"),
}
QUICK = (("the counters", "no space"), ("its own name", "death"), ("an old one's files", "death"))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param(place, name, marks=() if (place, name) in QUICK else pytest.mark.slow)
        for place in PLACES
        for name in KINDS
    ],
)
def test_the_command_goes_on_exactly_after_any_fault(
    place: str, name: str, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kind, (called, path) = tmp_path / "run", KINDS[name], PLACES[place]
    shutil.copytree(scene.folder, folder)
    at = max(
        number
        for number, call in enumerate(scene.calls)
        if call.name == called and call.path.startswith(path)
    )
    if isinstance(kind, str):
        assert in_a_child(partial(disturbed, scene, folder, at, kind)) == DIED
    else:
        disturbed(scene, folder, at, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_report", lambda folder: folder / "report.html")
        assert main([*scene.arguments, f"--output={folder}", "--resume=auto"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "resuming at step" in output.out
    assert summary(folder)["weights_sha256"] == summary(scene.whole)["weights_sha256"]
    assert comparable_metrics(folder) == comparable_metrics(scene.whole)
    assert steps_of(folder) == [DISTURBED, STEPS]
