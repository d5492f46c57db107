"""Small corpora on disk, and a cache of the tests' own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run tests are shared: a slow example is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

REAL_TEXT = Path(__file__).parents[4] / "shared" / "data" / "en"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOWRANK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def json_lines() -> Callable[[Sequence[object]], bytes]:
    """JSON lines of texts, as bytes; bytes stand for themselves."""

    def build(items: Sequence[object]) -> bytes:
        lines = [
            item if isinstance(item, bytes) else json.dumps({"text": item, "url": "u"}).encode()
            for item in items
        ]
        return b"\n".join([*lines, b""])

    return build


@pytest.fixture
def corpus(tmp_path: Path, json_lines: Callable[[Sequence[object]], bytes]) -> Path:
    """Four training shards of 50 documents and a validation shard, in C4's layout."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in range(4):
        texts = [f"shard {shard} document {i} " + "word " * (i % 7) for i in range(50)]
        name = f"c4-train.{shard:05d}-of-00004.json.gz"
        (folder / name).write_bytes(gzip.compress(json_lines(texts)))
    texts = [f"validation document {i} \N{SNOWMAN}" for i in range(40)]
    name = "c4-validation.00000-of-00001.json.gz"
    (folder / name).write_bytes(gzip.compress(json_lines(texts)))
    return folder


@pytest.fixture
def real_text() -> Path:
    if not REAL_TEXT.is_dir():
        pytest.skip("the real English text is not beside this repository")
    return REAL_TEXT
