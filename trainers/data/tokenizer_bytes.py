"""A byte tokenizer, without training or download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .tokenizer_backend import byte_level, save_backend


class ByteTokenizer:
    """One token for each UTF-8 byte, and one more that ends a document."""

    vocabulary_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's UTF-8 bytes."""
        return [list(text.encode()) for text in texts]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """The text's UTF-8 bytes, and a one for each."""
        ids = self.encode(text)
        return ids, [1] * len(ids)

    def save(self, folder: Path) -> None:
        """Write an equal Hugging Face tokenizer: byte-level BPE with an empty merge table."""
        save_backend(byte_level(), folder)
