from __future__ import annotations

import pytest

from lowrank.trainers.data import DataConfig


def test_defaults_are_valid() -> None:
    assert DataConfig().source == "stdlib"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, r"data\.sequence_length must be .* at least 2, got 1"),
        ({"sequence_length": "256"}, r"data\.sequence_length must be an integer"),
        ({"workers": -1}, r"data\.workers must be .* at least 0, got -1"),
        ({"workers": True}, r"data\.workers must be an integer"),
        ({"shuffle_block": -3}, r"data\.shuffle_block must be"),
        ({"packing": "best"}, r"data\.packing must be 'pack' or 'pad', got 'best'"),
        ({"bad_documents": "drop"}, r"data\.bad_documents must be 'skip' or 'error', got 'drop'"),
        ({"source": ""}, r"data\.source must be a non-empty string"),
        ({"tokenizer": None}, r"data\.tokenizer must be a non-empty string"),
    ],
)
def test_wrong_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)  # type: ignore[arg-type]
