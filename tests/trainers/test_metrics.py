import json
import math
from pathlib import Path

from lowrank.trainers.metrics import MetricsWriter, cut_after


def write(path: Path, steps: int) -> None:
    with MetricsWriter(path) as writer:
        for step in range(steps + 1):
            writer.write("train", step, loss=0.1 * step)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_are_lines_and_numbers_keep_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("train", 1, loss=0.1 + 0.2, time={"seconds": math.pi})
        # On the disk's side at once, so that a kill loses nothing.
        record = json.loads(path.read_text())
    assert record == {
        "kind": "train",
        "step": 1,
        "loss": 0.30000000000000004,
        "time": {"seconds": math.pi},
    }


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("train", 1, loss=math.nan, time={"seconds": math.inf})
    assert json.loads(path.read_text()) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "time": {"seconds": None},
    }


def test_cutting_drops_later_records_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 10)
    with path.open("a") as stream:
        stream.write('{"kind": "train", "st')
    cut_after(path, 6)
    assert steps(path) == list(range(7))
    write_more = path.read_text() + '{"kind": "train", "step": 7'
    path.write_text(write_more)
    cut_after(path, 100)
    assert steps(path) == list(range(7))


def test_cutting_what_is_missing_or_garbled(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_after(path, 5)
    assert path.read_text() == ""
    path.write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe\x00\n{"kind": "train", "step": 2}\n')
    cut_after(path, 5)
    assert steps(path) == [1]
    cut_after(path, -1)
    assert path.read_text() == ""


def test_appending_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 2)
    write(path, 1)
    assert steps(path) == [0, 1, 2, 0, 1]
