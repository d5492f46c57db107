from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.trainers.data import (
    DataConfig,
    DataError,
    DataWarning,
    Tokenizer,
    build_tokenizer,
    tokenizer_bpe,
    tokenizer_pretrained,
)
from lowrank.trainers.data.cache import cache_folder
from lowrank.trainers.data.tokenizer import END_OF_TEXT
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

SAMPLE = "Caf\u00e9 \u2603 costs 3.50\n\tif x: return <|endoftext|> </s> <extra_id_7>"


@pytest.fixture
def bpe(corpus: Path) -> Tokenizer:
    return build_tokenizer(DataConfig(source=str(corpus)), 300)


@pytest.fixture
def like_t5(tmp_path: Path) -> str:
    """A folder with a Unigram tokenizer whose sentinels lie above its pieces, as T5's do."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(0x21, 0x7F)]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *letters]
    sentinels = [f"<extra_id_{i}>" for i in range(9, -1, -1)]
    vocabulary = [(piece, -2.0) for piece in (*pieces, *sentinels)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    folder = tmp_path / "like_t5"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=sentinels,
    ).save_pretrained(str(folder))
    return str(folder)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_bytes_give_the_text_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(text)).decode() == text
    assert tokenizer.encode_with_bytes(text) == (list(text.encode()), [1] * len(text.encode()))


def test_bpe_covers_every_text_and_byte(bpe: Tokenizer) -> None:
    @given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
    def check(text: str) -> None:
        ids, counts = bpe.encode_with_bytes(text)
        assert ids == bpe.encode(text)
        assert len(ids) == len(counts)
        assert sum(counts) == len(text.encode())
        assert bpe.encode_batch([text, "x"]) == [ids, bpe.encode("x")]

    check()


def test_special_tokens_in_a_text_are_text(bpe: Tokenizer) -> None:
    assert bpe.eos_id not in bpe.encode(SAMPLE)
    assert max(bpe.encode(SAMPLE)) < bpe.vocabulary_size <= 300


def test_training_is_deterministic_and_cached(
    corpus: Path, own_cache: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=str(corpus))
    (cached,) = (own_cache / "tokenizers").iterdir()
    content = cached.read_text(encoding="utf-8")
    cached.unlink()
    assert build_tokenizer(config, 300).fingerprint == bpe.fingerprint
    assert cached.read_text(encoding="utf-8") == content

    def refuse(*_: object) -> str:
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenizer_bpe, "train", refuse)
    assert build_tokenizer(config, 300).fingerprint == bpe.fingerprint
    with pytest.raises(AssertionError, match="trained again"):
        build_tokenizer(config, 301)


@pytest.mark.parametrize("content", ["", '{"version": "1.0"', '{"version": "1.0"}'])
def test_damaged_cache_is_made_again(
    corpus: Path, own_cache: Path, bpe: Tokenizer, content: str
) -> None:
    (cached,) = (own_cache / "tokenizers").iterdir()
    cached.write_text(content)
    assert build_tokenizer(DataConfig(source=str(corpus)), 300).fingerprint == bpe.fingerprint
    assert len(cached.read_text(encoding="utf-8")) > 1000


def test_cache_that_cannot_be_written_is_a_warning(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file"))
    with pytest.warns(DataWarning, match="can't be cached"):
        tokenizer = build_tokenizer(DataConfig(source=str(corpus)), 300)
    assert tokenizer.vocabulary_size <= 300


def test_cache_folder_follows_the_environment(tmp_path: Path) -> None:
    own, shared = str(tmp_path / "own"), str(tmp_path / "shared")
    assert cache_folder({"LOWRANK_CACHE": own, "XDG_CACHE_HOME": shared}) == Path(own)
    assert cache_folder({"XDG_CACHE_HOME": shared}) == Path(shared) / "lowrank"
    assert cache_folder({}) == Path.home() / ".cache" / "lowrank"


def test_bpe_needs_room_and_text(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 257 .* the model's is 256"):
        build_tokenizer(DataConfig(source=str(corpus)), 256)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text("nonsense\n")
    (tmp_path / "bad" / "val.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="no usable training document for a tokenizer"):
        build_tokenizer(DataConfig(source=str(tmp_path / "bad")), 300)
    with pytest.raises(DataError, match=r"train.jsonl line 1: broken JSON"):
        build_tokenizer(DataConfig(source=str(tmp_path / "bad"), bad_documents="error"), 300)


def test_tokenizer_larger_than_the_model_is_refused_and_both_sizes_named() -> None:
    with pytest.raises(ValueError, match=r"'bytes' has 257 tokens, more than .* of 256"):
        build_tokenizer(DataConfig(tokenizer="bytes"), 256)
    assert build_tokenizer(DataConfig(tokenizer="bytes"), 32_000).vocabulary_size == 257


def same_ids(tokenizer: Tokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(str(folder))
    text = "Caf\u00e9 \u2603 costs 3.50\n\tif x: return  y"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert loaded.eos_token_id == tokenizer.eos_id


def test_saved_bpe_loads_with_transformers(bpe: Tokenizer, tmp_path: Path) -> None:
    same_ids(bpe, tmp_path / "saved")
    again = build_tokenizer(DataConfig(tokenizer=str(tmp_path / "saved")), 300)
    assert again.encode(SAMPLE) == bpe.encode(SAMPLE)
    assert again.eos_id == bpe.eos_id
    assert sum(again.encode_with_bytes(SAMPLE)[1]) == len(SAMPLE.encode())


def test_saved_bytes_load_with_transformers(tmp_path: Path) -> None:
    same_ids(ByteTokenizer(), tmp_path / "saved")


def test_sentinels_of_t5_need_no_place_in_the_model(like_t5: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer=like_t5), 98)
    assert tokenizer.vocabulary_size == 98
    assert tokenizer.eos_id == 1
    ids = tokenizer.encode("costs <extra_id_7> </s>")
    assert max(ids) < 98
    assert tokenizer.encode_batch(["costs <extra_id_7> </s>"]) == [ids]
    with pytest.raises(ValueError, match="has 98 tokens, more than the model's vocabulary of 97"):
        build_tokenizer(DataConfig(tokenizer=like_t5), 97)
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_pretrained_byte_counts_cover_the_text(like_t5: str) -> None:
    tokenizer = build_tokenizer(DataConfig(tokenizer=like_t5), 98)

    @given(st.text(alphabet="ab c\u00e9\u2603", max_size=30))
    def check(text: str) -> None:
        ids, counts = tokenizer.encode_with_bytes(text)
        assert ids == tokenizer.encode(text)
        assert len(counts) == len(ids)
        assert min(counts, default=0) >= 0
        assert sum(counts) == (len(text.encode()) if counts else 0)

    check()


@pytest.mark.parametrize("make", [lambda request: "bpe", lambda request: "like_t5"])
def test_tokenizers_travel_to_workers(make: Callable[[Any], str], request: Any) -> None:
    value = request.getfixturevalue(make(request))
    tokenizer = (
        build_tokenizer(DataConfig(tokenizer=value), 98) if isinstance(value, str) else value
    )
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert (copied.eos_id, copied.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)


def test_unknown_name_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable HF_HUB_OFFLINE is read once, when the library is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        r"^the tokenizer 'nobody/no-such' can't be loaded: no such folder, and the hub [^\n]*$"
    )
    with pytest.raises(ValueError, match=message):
        build_tokenizer(DataConfig(tokenizer="nobody/no-such"), 300)


def test_without_a_network_a_name_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    asked: list[str] = []
    loads: list[dict[str, Any]] = []

    def unreachable(self: object, name: str, timeout: float) -> None:
        asked.append(name)
        raise ConnectionError("Name or service not known")

    def load(name: str, **keywords: Any) -> None:
        loads.append(keywords)
        raise OSError("nothing here")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(tokenizer_pretrained, "_WAIT", 0.0)
    with pytest.raises(ValueError, match="ConnectionError: Name or service not known"):
        tokenizer_pretrained.PretrainedTokenizer("t5-base")
    # Each of the library's own downloads would be tried six times.
    assert (asked, loads) == (["t5-base"] * 2, [{"local_files_only": True}])


def test_end_of_text_is_the_usual_one() -> None:
    assert END_OF_TEXT == "<|endoftext|>"
