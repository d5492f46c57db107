"""A disk that is full at any of a checkpoint's files: one line, nothing half-written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank.trainers import checkpoint as checkpoint_module
from lowrank.trainers import files, parts
from lowrank.trainers.files import WriteError, write_text, writing

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]
NAME = "qgalore_adamw_8bit"
FILES = (
    "model.safetensors",
    "layers.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "optimizer.pt",
    "trainer.pt",
    "manifest.json",
)


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Whatever writes that file of the checkpoint of that step finds no room."""
    plain = files.writing

    def full(path: Path) -> object:
        if path.name == name and path.parent.name == f".writing-step-{step:08d}":
            return plain_full(path)
        return plain(path)

    class plain_full:
        def __init__(self, path: Path) -> None:
            self.inner = plain(path)

        def __enter__(self) -> None:
            self.inner.__enter__()
            error = OSError(errno.ENOSPC, "No space left on device")
            self.inner.__exit__(OSError, error, error.__traceback__)

        def __exit__(self, *_: object) -> None:
            raise AssertionError("the write before it failed")

    for module in (files, parts, checkpoint_module):
        monkeypatch.setattr(module, "writing", full)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    name: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = tiny(folder, 4, "checkpoint.every=2", "eval.every=0", optimizer=NAME)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk_at(patch, name, 4)
        status, _, errors = run(arguments)
    first = folder / "checkpoints" / "step-00000002"
    assert status == 1
    assert errors == (
        f"lowrank: the checkpoint {folder}/checkpoints/step-00000004 can't be written ({name}: No"
        f" space left on device); the last whole one is {first}; make room, then go on with"
        f" --resume {folder}\n"
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [first.name]
    assert set(FILES) <= {path.name for path in first.iterdir()}
    assert run([*arguments, "--resume=auto"])[0] == 0


def test_a_first_checkpoint_that_fails_leaves_no_folder(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk_at(patch, "optimizer.pt", 2)
        status, _, errors = run(tiny(folder, 2, "eval.every=0"))
    assert status == 1
    assert "there is none before it; make room" in errors
    assert errors.count("\n") == 1
    assert not (folder / "checkpoints").exists()


def test_what_libraries_raise_on_a_full_device_is_understood(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no full device")
    link = tmp_path / "optimizer.pt"
    link.symlink_to(full)
    with pytest.raises(WriteError) as caught:
        parts._save({"a": torch.zeros(100_000)}, link)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(link))


def test_a_failed_text_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(WriteError, match=r"No space left.*summary\.json"):
        write_text(path, "new")
    assert everything(tmp_path) == ["summary.json"]
    assert path.read_text() == "old"


def test_other_errors_are_not_taken_for_the_disks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), writing(tmp_path / "a"):
        raise RuntimeError("CUDA out of memory")
