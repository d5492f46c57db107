"""Byte-level BPE: trained on the run's own data with `tokenizers`, and cached."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..files import write_text
from ..missing import require
from .cache import cache_folder
from .config import DataConfig
from .diagnosis import why_unusable
from .errors import BadDocumentError, DataError, DataWarning, first_line
from .records import Source, where
from .source import open_source
from .tokenizer import END_OF_TEXT
from .tokenizer_backend import empty_byte_level, save_backend

# Part of the cache's key: to be raised with any change of what is trained or on what.
VERSION = 1
TRAINING_CHARACTERS = 8_000_000
TRAINING_SHARDS = 8
# Where those shards hold fewer than this, the others are read too: there are many short files.
ENOUGH_CHARACTERS = 1_000_000
SMALLEST = 257


class BPETokenizer:
    """A byte-level BPE in `tokenizers`' own JSON form.

    Args:
        serialized: The JSON.

    Raises:
        ValueError: If it is no such tokenizer.
    """

    def __init__(self, serialized: str) -> None:
        tokenizers = require("tokenizers", "train")
        try:
            self._backend = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"not a tokenizer file ({first_line(error)})") from error
        eos_id = self._backend.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT!r}")
        self._serialized = serialized
        self._backend.encode_special_tokens = True
        self.eos_id: int = eos_id
        self.vocabulary_size: int = self._backend.get_vocab_size()
        self.fingerprint = "bpe-" + hashlib.sha256(serialized.encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, str]:
        return {"serialized": self._serialized}

    def __setstate__(self, state: dict[str, str]) -> None:
        BPETokenizer.__init__(self, state["serialized"])

    def encode(self, text: str) -> list[int]:
        """The text's token ids."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's token ids."""
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """The text's token ids and each one's bytes: the alphabet has a character for each byte."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [len(token) for token in encoding.tokens]

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face tokenizer."""
        save_backend(self._serialized, folder)


def trained_tokenizer(config: DataConfig, vocabulary_size: int) -> BPETokenizer:
    """A BPE of the configured data from the cache, or trained now and put there.

    Args:
        config: Whose source's training documents are used, 8 million characters at most.
        vocabulary_size: Tokens, the end-of-text token included; few data may give fewer.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If the size is below 257 or the data can't be read.
    """
    if vocabulary_size < SMALLEST:
        raise ValueError(
            f"a byte-level BPE needs a vocabulary of at least {SMALLEST} (256 bytes and "
            f"{END_OF_TEXT}), the model's is {vocabulary_size}"
        )
    source = open_source(config)
    key = f"{source.fingerprint()['sha256']} {vocabulary_size} {VERSION}"
    name = f"bpe-{vocabulary_size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    path = cache_folder() / "tokenizers" / name
    try:
        # A file that is cut short or isn't ours is simply made again.
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    serialized = train(training_texts(source, config.bad_documents), vocabulary_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, serialized)
    except OSError as error:
        warnings.warn(
            f"the trained tokenizer can't be cached in {path.parent} ({error.strerror or error})",
            DataWarning,
            stacklevel=2,
        )
    return BPETokenizer(serialized)


def training_texts(source: Source, bad_documents: str = "skip") -> Iterator[str]:
    """The training documents that a tokenizer is trained on: an equal part of up to eight shards.

    Where these are short, what is missing is taken from the others in turn.

    Args:
        source: The data.
        bad_documents: ``"error"`` raises at the first unusable record; else it is left to the
            training stream to count and report.

    Yields:
        Texts, of 8 million characters in all at most.

    Raises:
        DataError: If there is no document at all.
    """
    shards = source.shards("train")
    count = min(len(shards), TRAINING_SHARDS)
    first = [shards[i * len(shards) // count] for i in range(count)]
    budget = TRAINING_CHARACTERS // len(first)
    read = 0
    for shard in [*first, *(shard for shard in shards if shard not in first)]:
        if shard not in first and read >= ENOUGH_CHARACTERS:
            break
        left = budget
        for record in source.records(shard):
            try:
                if record.problem is not None:
                    raise BadDocumentError(record.problem)
                text = source.text(shard, record)
            except BadDocumentError as error:
                if bad_documents == "error":
                    raise DataError(f"{where(shard, record.number)}: {error}") from error
                continue
            yield text[:left]
            read += min(left, len(text))
            left -= len(text)
            if left <= 0:
                break
    if not read:
        problems = why_unusable(source, "train")
        raise DataError(
            f"{source.label} holds no usable training document for a tokenizer: {problems}"
        )


def train(texts: Iterator[str], vocabulary_size: int) -> str:
    """Train a byte-level BPE.

    Args:
        texts: Documents.
        vocabulary_size: Tokens, the end-of-text token included.

    Returns:
        The tokenizer in `tokenizers`' JSON form.
    """
    tokenizers = require("tokenizers", "train")
    backend = empty_byte_level()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    serialized: str = backend.to_str()
    return serialized
