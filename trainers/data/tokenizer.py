"""The tokenizer interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids, without special tokens: those of a text's own are taken as plain text.

    Attributes:
        vocabulary_size: All ids are below it.
        eos_id: The token that ends a document.
        fingerprint: Equal for tokenizers that give equal ids.
    """

    vocabulary_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The text's token ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's token ids."""

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """The text's token ids, and how many of its UTF-8 bytes each stands for.

        The bytes sum to all of the text's.
        """

    def save(self, folder: Path) -> None:
        """Write files that ``transformers.AutoTokenizer.from_pretrained(folder)`` loads."""
