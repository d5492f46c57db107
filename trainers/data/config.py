"""What to train on and how it is cut into sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .records import TEXT_KEY

#: Each is a process of its own.
MOST_WORKERS = 256
PACKINGS = ("pack", "pad")
BAD_DOCUMENTS = ("skip", "error")


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
        source: ``"stdlib"`` (the running Python installation's own text), ``"c4"`` (allenai/c4,
            English, streamed from the Hugging Face hub) or a folder of ``.json.gz``, ``.jsonl``,
            ``.jsonl.gz``, ``.parquet`` and ``.txt`` files.
        tokenizer: ``"bpe"`` (byte-level BPE trained on this data and cached), ``"bytes"``, or the
            name or path of a Hugging Face tokenizer such as ``"t5-base"``.
        sequence_length: Tokens per sequence, L.
        packing: ``"pack"`` joins documents with an end-of-text token and predicts every token but
            the very first once; ``"pad"`` gives each document one sequence, truncated or padded
            to L.
        shuffle_block: Documents that are shuffled among themselves; 0 or 1 reads shards and
            documents in their order.
        workers: Loader processes per rank; 0 loads in the training process.
        text_key: Field or column of a document's text in JSON and parquet files.
        bad_documents: ``"skip"`` counts and passes over unusable records, ``"error"`` stops at
            the first.
    """

    source: str = "stdlib"
    tokenizer: str = "bpe"
    sequence_length: int = 256
    packing: str = "pack"
    shuffle_block: int = 1024
    workers: int = 0
    bad_documents: str = "skip"
    text_key: str = TEXT_KEY

    def __post_init__(self) -> None:
        for name in ("source", "tokenizer", "text_key"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"data.{name} must be a non-empty string, got {value!r}")
        for name, least in (("sequence_length", 2), ("shuffle_block", 0), ("workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"data.{name} must be an integer of at least {least}, got {value!r}"
                )
        if self.workers > MOST_WORKERS:
            raise ValueError(
                f"data.workers must be an integer up to {MOST_WORKERS}, got {self.workers}"
            )
        for name, accepted in (("packing", PACKINGS), ("bad_documents", BAD_DOCUMENTS)):
            value = getattr(self, name)
            if value not in accepted:
                choices = " or ".join(repr(choice) for choice in accepted)
                raise ValueError(f"data.{name} must be {choices}, got {value!r}")


@dataclass(frozen=True)
class Batch:
    """Sequences to train on or to evaluate.

    Attributes:
        inputs: Token ids, (B, L) int64.
        targets: The token that follows each input, (B, L) int64; -100 where nothing is predicted.
    """

    inputs: Tensor
    targets: Tensor


IGNORED = -100
