from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.trainers.data import DataConfig, DataError, data_fingerprint
from lowrank.trainers.data.errors import BadDocumentError
from lowrank.trainers.data.records import Split
from lowrank.trainers.data.stdlib import StdlibSource


def passages_of(source: StdlibSource, split: Split) -> list[tuple[str, int, str]]:
    found = []
    for shard in source.shards(split):
        for record in source.records(shard):
            assert isinstance(record.payload, tuple)
            found.append((record.payload[0], record.number, source.text(shard, record)))
    return found


def test_running_python_gives_real_text() -> None:
    source = StdlibSource()
    train, validation = passages_of(source, "train"), passages_of(source, "validation")
    size = sum(len(text) for _, _, text in train)
    held_out = sum(len(text) for _, _, text in validation)
    assert size > 4_000_000
    assert 0.01 < held_out / (size + held_out) < 0.12
    assert not {name for name, _, _ in train} & {name for name, _, _ in validation}
    names = {name for name, _, _ in train + validation}
    assert {"argparse.py", "topic:for"} <= names
    assert not [name for name in names if "site-packages" in name or name.startswith("test/")]
    assert max(len(text) for _, _, text in train) < 40_000


def test_order_and_fingerprint_are_the_same_each_time() -> None:
    first, second = StdlibSource(), StdlibSource()
    assert passages_of(first, "validation") == passages_of(second, "validation")
    assert first.fingerprint() == second.fingerprint()
    fingerprint = data_fingerprint(DataConfig())
    assert fingerprint == first.fingerprint()
    assert "python" in fingerprint


def test_fingerprint_follows_contents(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"module{i}.py").write_text(f"value = {i}\n")
    before = StdlibSource(tmp_path).fingerprint()
    (tmp_path / "module7.py").write_text("value = 8\n")
    after = StdlibSource(tmp_path).fingerprint()
    assert before["files"] == after["files"]
    assert before["sha256"] != after["sha256"]


def test_only_the_library_is_taken(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"module{i}.py").write_text(f"value = {i}\n")
    for name in ("site-packages/x.py", "test/y.py", "json/tests/z.py", "_sysconfigdata_a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret = 1\n")
    source = StdlibSource(tmp_path)
    texts = [text for split in ("train", "validation") for *_, text in passages_of(source, split)]
    assert len([text for text in texts if text.startswith("value")]) == 60
    assert not [text for text in texts if "secret" in text]


def test_bytes_that_are_no_utf8_make_a_bad_document(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"module{i}.py").write_bytes(b"value = '\xff'\n")
    source = StdlibSource(tmp_path)
    shard = source.shards("train")[0]
    record = next(r for r in source.records(shard) if "module" in str(r.payload))
    with pytest.raises(BadDocumentError, match=r"module\d+\.py: .*UTF-8"):
        source.text(shard, record)


def test_installation_without_sources_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StdlibSource, "_topics", {})
    with pytest.raises(DataError, match="holds no library sources"):
        StdlibSource(tmp_path)
