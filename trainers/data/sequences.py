"""Cuts tokenised documents into sequences of inputs and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .config import IGNORED, Batch
from .cursor import Cursor


def packed_sequence(cursor: Cursor, length: int, eos_id: int) -> tuple[list[int], list[int]]:
    """The next sequence of documents joined with an end-of-text token after each.

    Sequences overlap by one token, the last target being the next first input, so that every
    token of the stream but its very first is a target once.

    Args:
        cursor: Is moved on; keeps the overlapping token.
        length: Of inputs and of targets, L.
        eos_id: The end-of-text token.

    Returns:
        Inputs and targets, L each.
    """
    carry = cursor.position.carry
    tokens = [] if carry < 0 else [carry]
    while len(tokens) <= length:
        document = cursor.document()
        offset = cursor.position.offset
        taken = document[offset : offset + length + 1 - len(tokens)]
        tokens += taken
        offset += len(taken)
        if offset == len(document) and len(tokens) <= length:
            tokens.append(eos_id)
            offset += 1
        if offset > len(document):
            cursor.advance()
        else:
            cursor.position = replace(cursor.position, offset=offset)
    cursor.position = replace(cursor.position, carry=tokens[-1])
    return tokens[:-1], tokens[1:]


def padded_sequence(cursor: Cursor, length: int, eos_id: int) -> tuple[list[int], list[int]]:
    """The next document as one sequence.

    Args:
        cursor: Is moved on.
        length: Of inputs and of targets, L.
        eos_id: The end-of-text token, which also fills up.

    Returns:
        Inputs and targets, L each.
    """
    sequence = pad(cursor.document(), length, eos_id)
    cursor.advance()
    return sequence


def pad(document: list[int], length: int, eos_id: int) -> tuple[list[int], list[int]]:
    """A document as one sequence: cut to L - 1 tokens, ended, and filled up to L.

    Args:
        document: Token ids.
        length: L.
        eos_id: The end-of-text token, which also fills up.

    Returns:
        Inputs and targets, L each; a target is the next input, and ignored where that is filling.
    """
    tokens = [*document[: length - 1], eos_id]
    filling = length - len(tokens)
    return tokens + [eos_id] * filling, tokens[1:] + [IGNORED] * (filling + 1)


SEQUENCES: dict[str, Callable[[Cursor, int, int], tuple[list[int], list[int]]]] = {
    "pack": packed_sequence,
    "pad": padded_sequence,
}


def batch_of(sequences: list[tuple[list[int], list[int]]]) -> Batch:
    """Stack sequences.

    Args:
        sequences: B pairs of L inputs and L targets.

    Returns:
        The batch, (B, L).
    """
    return Batch(
        inputs=torch.tensor([inputs for inputs, _ in sequences], dtype=torch.int64),
        targets=torch.tensor([targets for _, targets in sequences], dtype=torch.int64),
    )
