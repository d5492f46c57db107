"""From the configured name to a tokenizer that fits the model."""

from __future__ import annotations

from .config import DataConfig
from .tokenizer import Tokenizer
from .tokenizer_bpe import trained_tokenizer
from .tokenizer_bytes import ByteTokenizer
from .tokenizer_pretrained import PretrainedTokenizer


def build_tokenizer(config: DataConfig, vocabulary_size: int) -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
        config: Its ``tokenizer`` and, for ``"bpe"``, the data that it is trained on.
        vocabulary_size: The model's; ``"bpe"`` is trained to it, any other may be smaller.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If the tokenizer can't be had, or has more tokens than the model.
    """
    if isinstance(vocabulary_size, bool) or not isinstance(vocabulary_size, int):
        raise ValueError(f"the model's vocabulary size must be an integer, got {vocabulary_size!r}")
    tokenizer: Tokenizer
    if config.tokenizer == "bpe":
        tokenizer = trained_tokenizer(config, vocabulary_size)
    elif config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = PretrainedTokenizer(config.tokenizer)
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"the tokenizer {config.tokenizer!r} has {tokenizer.vocabulary_size} tokens, more than "
            f"the model's vocabulary of {vocabulary_size}; raise that or choose another tokenizer"
        )
    return tokenizer
