"""A process's share of each step's batch, which doesn't depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .config import Batch, DataConfig
from .stream import TrainingStream
from .tokenizer import Tokenizer


class TrainingShare:
    """One process's micro-batches of each optimizer step.

    The training data are dealt into `shards` streams, and a step's batch is the next
    `accumulation` batches of B sequences of each: stream after stream, batch after batch, row
    after row. Processes divide these rows evenly, in their order. So the number of processes may
    change when a run is resumed, and each step still trains on the same sequences. With as many
    processes as shards, process i has stream i to itself.

    Args:
        config: the data and how it is cut.
        tokenizer: turns it into ids.
        batch_size: sequences per batch, B.
        accumulation: batches of each stream in a step.
        seed: of the order of shards and documents.
        shards: number of streams.
        rank: this process's number.
        world_size: number of processes.
        on_warning: as for `TrainingStream`.

    Raises:
        ValueError: the processes can't divide a step's rows evenly, or as for `TrainingStream`.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        shards: int,
        rank: int = 0,
        world_size: int = 1,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        check_division(batch_size, accumulation, shards, world_size)
        self._batch_size = batch_size
        self._accumulation = accumulation
        rows = shards * accumulation * batch_size // world_size
        self._first, self._end = rank * rows, (rank + 1) * rows
        per_stream = accumulation * batch_size
        numbers = range(self._first // per_stream, -(-self._end // per_stream))
        self._streams = {
            number: TrainingStream(
                config,
                tokenizer,
                batch_size=batch_size,
                seed=seed,
                rank=number,
                world_size=shards,
                on_warning=on_warning if self._owns(number) else lambda _: None,
            )
            for number in numbers
        }

    def _owns(self, number: int) -> bool:
        """Whether this process speaks for a stream that others may read, too."""
        return self._first <= number * self._accumulation * self._batch_size < self._end

    def step(self) -> list[Batch]:
        """This process's micro-batches of the next step, of at most B sequences each.

        Raises:
            DataError: a stream can't go on.
        """
        pieces = []
        for number, stream in self._streams.items():
            start = number * self._accumulation * self._batch_size
            for _ in range(self._accumulation):
                batch = next(stream)
                piece = slice(max(self._first - start, 0), min(self._end - start, self._batch_size))
                if piece.start < piece.stop:
                    pieces.append(_rows(batch, piece))
                start += self._batch_size
        return _regrouped(pieces, self._batch_size)

    def prefetch(self) -> None:
        """Makes the next batches already, so that data of no use are found before a run begins.

        Raises:
            DataError: there is no such batch.
        """
        for stream in self._streams.values():
            stream.prefetch()

    @property
    def epoch(self) -> int:
        """Passes over its data that this process's first stream has completed."""
        return next(iter(self._streams.values())).epoch

    @property
    def skipped_documents(self) -> int:
        """Records passed over so far; summed over the processes, every stream counts once."""
        return sum(
            stream.skipped_documents
            for number, stream in self._streams.items()
            if self._owns(number)
        )

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The positions of the streams that this process speaks for, by their numbers."""
        return {
            number: stream.state_dict()
            for number, stream in self._streams.items()
            if self._owns(number)
        }

    def load_state_dict(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Goes to the positions of all processes' streams.

        Raises:
            ValueError: a stream's position is missing, or not one of the same data and settings.
        """
        for number, stream in self._streams.items():
            if number not in states:
                raise ValueError(
                    f"the saved data positions are of streams {sorted(states)}, not of {number}"
                )
            stream.load_state_dict(states[number])

    def close(self) -> None:
        """Ends the loader processes."""
        for stream in self._streams.values():
            stream.close()


def check_division(batch_size: int, accumulation: int, shards: int, world_size: int) -> None:
    """Checks that processes can divide a step's batch evenly.

    Raises:
        ValueError: they can't; the message has the numbers.
    """
    total = shards * accumulation * batch_size
    if total % world_size:
        raise ValueError(
            f"{world_size} processes can't share a step's {total} sequences evenly"
            f" (train.batch_size {batch_size} x train.accumulation {accumulation} x"
            f" distributed.data_shards {shards}); accepted: a number of processes that divides"
            f" {total}"
        )


def _rows(batch: Batch, piece: slice) -> Batch:
    if piece == slice(0, batch.inputs.shape[0]):
        return batch
    return Batch(batch.inputs[piece], batch.targets[piece])


def _regrouped(pieces: Sequence[Batch], size: int) -> list[Batch]:
    """The same rows in batches of `size`, the last of which may be smaller."""
    if all(piece.inputs.shape[0] == size for piece in pieces):
        return list(pieces)
    inputs = torch.cat([piece.inputs for piece in pieces])
    targets = torch.cat([piece.targets for piece in pieces])
    starts = range(0, inputs.shape[0], size)
    return [Batch(inputs[at : at + size], targets[at : at + size]) for at in starts]
