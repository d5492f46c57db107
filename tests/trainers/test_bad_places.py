"""Output folders and configuration files that are wrong: one line each, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_pretrain import crash
from tiny_runs import comparable_metrics, summary

from lowrank.trainers.files import WriteError
from lowrank.trainers.metrics import MetricsWriter

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]


@pytest.mark.parametrize("resume", [(), ("--resume=auto",)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("checkpoints", "folder"),
        ("config.yaml", "file"),
        ("metrics.jsonl", "file"),
        ("summary.json", "file"),
        ("report.html", "file"),
        (".lock", "file"),
    ],
)
def test_what_stands_in_a_runs_way_is_named_before_training(
    name: str, kind: str, resume: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "folder":
        (folder / name).write_text("")
    else:
        (folder / name).mkdir()
    status, output, errors = run(tiny(folder, 2, *resume))
    assert (status, output) == (2, "")
    assert errors == (
        f"lowrank: {folder / name} is not a {kind}, as it is in a run's folder; move it away or"
        " choose another --output\n"
    )
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("resume", [(), ("--resume=auto",)])
def test_a_file_is_no_output_folder(
    resume: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    status, _, errors = run(tiny(tmp_path / "file", 2, *resume))
    assert (status, errors.count("\n")) == (2, 1)
    assert f"--output {tmp_path / 'file'} is a file; accepted: a folder" in errors
    status, _, errors = run(tiny(tmp_path / "file" / "run", 2, *resume))
    assert (status, errors.count("\n")) == (1, 1)
    assert f"--output {tmp_path / 'file' / 'run'} can't be made: Not a directory" in errors


def test_a_folder_that_cannot_be_written_is_one_line(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "somewhere above")

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, _, errors = run(tiny(tmp_path / "run", 2))
    assert status == 1
    assert errors == f"lowrank: --output {tmp_path}/run can't be made: Permission denied\n"


def test_only_folders_made_for_a_run_that_never_began_are_removed(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "note").write_text("mine")
    for output in ("mine", "kept", "new", "mine/deep/er"):
        status, _, errors = run(tiny(tmp_path / output, 2, "--data=nowhere"))
        assert (status, errors.count("\n")) == (2, 1)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["kept", "kept/note", "mine"]


def test_the_datas_folder_is_no_output(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("some words of text")
    status, _, errors = run(tiny(tmp_path, 2, f"--data={tmp_path}"))
    assert status == 2
    assert "is the data's folder" in errors
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("settings", [(), ("data.workers=1",), ("data.tokenizer=bpe",)])
def test_data_of_no_use_leave_no_folder_and_one_line(
    settings: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "val.txt").write_text("some words to validate on")
    (data / "train.jsonl").write_text('{"body": "a"}\n')
    settings = ("eval.tokens=8", *settings)
    status, output, errors = run(tiny(tmp_path / "run", 2, f"--data={data}", *settings))
    assert (status, output) == (2, "")
    assert errors.count("\n") == 1
    assert "train.jsonl line 1: the JSON object has no field 'text' (it has 'body'" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: 5\n", "train is 5; accepted: a mapping of keys to values"),
        ("optimizer: [1]\n", r"optimizer is \[1\]; accepted: a mapping of keys to values"),
        ("5: {a: 1}\n", "unknown section 5 in the configuration; accepted: checkpoint, data"),
        ("? [a, b]\n: 1\n", "is not valid YAML: .*unhashable key"),
        ("[" * 5000, "is nested too deeply"),
    ],
)
def test_broken_configurations_are_one_line_even_below_other_layers(
    content: str, message: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    status, _, errors = run(tiny(tmp_path / "run", 2, f"--config={path}"))
    assert (status, errors.count("\n")) == (2, 1)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(errors)
    assert not (tmp_path / "run").exists()


def test_unreadable_configurations_name_the_file_once(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    _, _, errors = run(tiny(tmp_path / "run", 2, f"--config={path}"))
    assert errors == f"lowrank: cannot read the configuration {path}: No such file or directory\n"
    path.write_bytes("train: {}".encode("utf-16"))
    _, _, errors = run(tiny(tmp_path / "run", 2, f"--config={path}"))
    assert f"the configuration {path} is not UTF-8 text" in errors


def test_very_many_threads_are_refused(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    status, _, errors = run(tiny(tmp_path / "run", 2, "train.threads=100000"))
    assert status == 2
    assert "train.threads is 100000; accepted: 0 or a number of threads up to 1,024" in errors


def test_a_run_whose_configuration_was_lost_goes_on_with_its_checkpoints(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(tiny(whole, 8))
    crash(run, tiny(folder, 8), 5)
    (folder / "config.yaml").unlink()
    status, _, errors = run(["pretrain", f"--resume={folder}", "--device=cpu"])
    assert (status, errors) == (0, "")
    assert comparable_metrics(folder) == comparable_metrics(whole)
    assert (folder / "config.yaml").read_text() == (whole / "config.yaml").read_text()


def test_a_broken_summary_is_written_anew(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 3))
    before = summary(folder)
    (folder / "summary.json").write_text("{broken")
    status, _, errors = run(["pretrain", f"--resume={folder}", "--device=cpu"])
    assert (status, errors) == (0, "")
    assert summary(folder)["weights_sha256"] == before["weights_sha256"]


def test_metrics_on_a_full_disk_name_the_file() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no full device")
    with pytest.raises(WriteError, match="No space left on device") as caught:
        MetricsWriter(full).write("train", 1, loss=1.0)
    assert caught.value.filename == str(full)
