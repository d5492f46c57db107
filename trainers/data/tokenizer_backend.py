"""What the byte-level tokenizers share: the untrained form, and saving for Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..missing import require
from .tokenizer import END_OF_TEXT


def byte_level() -> str:
    """A tokenizer that gives each byte its value as id, in `tokenizers`' JSON form."""
    tokenizers = require("tokenizers", "train")
    backend = empty_byte_level()
    letters = _byte_letters()
    backend.model = tokenizers.models.BPE(
        vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]
    )
    backend.add_special_tokens([END_OF_TEXT])
    serialized: str = backend.to_str()
    return serialized


def save_backend(serialized: str, folder: Path) -> None:
    """Write a tokenizer of ours in the form that ``AutoTokenizer`` loads.

    Args:
        serialized: In `tokenizers`' JSON form.
        folder: Is made if need be.
    """
    transformers = require("transformers", "train")
    backend = require("tokenizers", "train").Tokenizer.from_str(serialized)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(str(folder))


def empty_byte_level() -> Any:
    """An untrained byte-level BPE of the `tokenizers` library."""
    tokenizers = require("tokenizers", "train")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _byte_letters() -> list[str]:
    """The visible character that byte-level BPE writes for each byte.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from
    U+0100 on.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]
