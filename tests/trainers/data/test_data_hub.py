"""C4 on the hub, played by local files in its layout."""

from __future__ import annotations

import gzip
import json
import locale
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.trainers.data import (
    DataConfig,
    DataError,
    TrainingStream,
    ValidationSet,
    data_fingerprint,
)
from lowrank.trainers.data import files as files_module
from lowrank.trainers.data import reader as reader_module
from lowrank.trainers.data.files import c4_source
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

datasets = pytest.importorskip("datasets")
CONFIG = DataConfig(source="c4", tokenizer="bytes", sequence_length=32, shuffle_block=16)


@pytest.fixture
def local_hub(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serve four training shards and one of validation; lists the addresses asked for."""
    monkeypatch.setattr(files_module, "C4_TRAIN_SHARDS", 4)
    monkeypatch.setattr(files_module, "C4_VALIDATION_SHARDS", 1)
    asked: list[str] = []
    load_dataset: Callable[..., Any] = datasets.load_dataset

    def from_folder(builder: str, *, data_files: dict[str, list[str]], **options: Any) -> Any:
        (address,) = data_files["train"]
        asked.append(address)
        assert options["streaming"] is True
        prefix = "hf://datasets/allenai/c4/en/"
        assert address.startswith(prefix)
        local = {"train": [str(corpus / address.removeprefix(prefix))]}
        return load_dataset(builder, data_files=local, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return asked


def test_shards_carry_the_hubs_names() -> None:
    source = c4_source()
    train, validation = source.shards("train"), source.shards("validation")
    assert len(train) == 1024
    assert len(validation) == 8
    assert train[7].location == "hf://datasets/allenai/c4/en/c4-train.00007-of-01024.json.gz"
    assert validation[7].name == "allenai/c4/en/c4-validation.00007-of-00008.json.gz"
    fingerprint = data_fingerprint(CONFIG)
    assert fingerprint["source"] == "c4"
    assert fingerprint["train_shards"] == 1024


def test_streamed_run_goes_on_where_it_stopped(local_hub: list[str]) -> None:
    tokenizer = ByteTokenizer()
    stream = TrainingStream(CONFIG, tokenizer, batch_size=4, seed=3)
    for _ in range(25):
        next(stream)
    state = stream.state_dict()
    expected = [next(stream) for _ in range(10)]
    local_hub.clear()
    resumed = TrainingStream(CONFIG, tokenizer, batch_size=4, seed=3)
    resumed.load_state_dict(state)
    for batch in expected:
        assert torch.equal(next(resumed).inputs, batch.inputs)
    # It opened the shard it stands in and what follows, not those behind it.
    order = [int(address.split("train.")[1][:5]) for address in local_hub]
    assert len(order) <= 2


def test_characters_of_the_hubs_files_stay_what_they_are(
    local_hub: list[str], corpus: Path
) -> None:
    texts = ["gr\u00fc\u00dfe", "\u2603 and more", "plain"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    # The layout's name needs as many shards as the fixture serves.
    (corpus / "c4-train.00001-of-00004.json.gz").write_bytes(gzip.compress(lines.encode()))
    source = c4_source()
    shard = source.shards("train")[1]
    assert [source.text(shard, record) for record in source.records(shard)] == texts


def test_another_locale_is_refused_not_misread(
    local_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "ISO-8859-1")
    stream = TrainingStream(CONFIG, ByteTokenizer(), batch_size=4, seed=3)
    with pytest.raises(DataError, match=r"encoding is ISO-8859-1, .*; set PYTHONUTF8=1"):
        next(stream)


def test_streamed_validation(local_hub: list[str]) -> None:
    found = ValidationSet(CONFIG, ByteTokenizer(), batch_size=4, tokens=500)
    assert found.tokens >= 500
    assert local_hub == ["hf://datasets/allenai/c4/en/c4-validation.00000-of-00001.json.gz"]


def test_network_that_fails_for_a_while_costs_no_record(
    local_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_WAITS", (0.0, 0.0))
    source = c4_source()
    shard = source.shards("train")[1]
    expected = list(source.records(shard))
    streamed = reader_module._streamed
    opened: list[int] = []

    def flaky(*arguments: Any) -> Iterator[dict[str, Any]]:
        opened.append(1)
        for number, example in enumerate(streamed(*arguments)):
            if number == 12 * len(opened):
                raise TimeoutError("read timed out")
            yield example

    monkeypatch.setattr(reader_module, "_streamed", flaky)
    assert list(source.records(shard)) == expected
    assert len(opened) == 5


def test_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(reader_module, "_WAITS", (0.0, 0.0))
    stream = TrainingStream(CONFIG, ByteTokenizer(), batch_size=4, seed=3)
    message = r"^allenai/c4/en/c4-train\.\d+-of-01024\.json\.gz can.t be streamed [^\n]*to host\)"
    with pytest.raises(DataError, match=message):
        next(stream)
