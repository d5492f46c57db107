"""Training and validation data: sources, tokenizers, and an exactly resumable stream of batches."""

from __future__ import annotations

from .config import Batch, DataConfig
from .errors import DataError, DataWarning
from .shares import TrainingShare, check_division
from .source import data_fingerprint
from .stream import TrainingStream
from .tokenizer import Tokenizer
from .tokenizer_choice import build_tokenizer
from .validation import ValidationSet

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "DataWarning",
    "Tokenizer",
    "TrainingShare",
    "TrainingStream",
    "ValidationSet",
    "build_tokenizer",
    "check_division",
    "data_fingerprint",
]
