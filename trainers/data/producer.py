"""Makes batches, each with the position that follows it, in this process or in loader workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .config import Batch, DataConfig
from .cursor import Cursor, Position
from .errors import DataError
from .order import Plan
from .records import Source
from .sequences import SEQUENCES, batch_of
from .source import open_source
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Produced:
    """What a stream gives for one batch.

    Attributes:
        batch: The batch; None if the stream can't go on.
        state: The stream's position after it.
        warnings: What was passed over on the way.
        error: Why there is no batch.
    """

    batch: Batch | None
    state: dict[str, int]
    warnings: tuple[str, ...] = ()
    error: str | None = None


def produce(
    config: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    plan: Plan,
    batch_size: int,
    state: dict[str, int],
) -> Iterator[Produced]:
    """One stream's batches without end.

    Args:
        config: How documents become sequences.
        source: The data.
        tokenizer: Turns them into ids.
        plan: The stream's part of the data.
        batch_size: Sequences per batch, B.
        state: The position to start from.

    Yields:
        Batches with their positions; after an error, nothing more.
    """
    warnings: list[str] = []
    cursor = Cursor(
        source,
        plan,
        tokenizer,
        strict=config.bad_documents == "error",
        position=Position.from_state(state),
        report=warnings.append,
    )
    next_sequence = SEQUENCES[config.packing]
    while True:
        try:
            batch = batch_of(
                [
                    next_sequence(cursor, config.sequence_length, tokenizer.eos_id)
                    for _ in range(batch_size)
                ]
            )
        except (DataError, ImportError) as error:
            # As a value: an exception from a worker would carry a traceback in its text.
            yield Produced(None, cursor.position.state(), tuple(warnings), str(error))
            return
        yield Produced(batch, cursor.position.state(), tuple(warnings))
        warnings.clear()


class _WorkerStreams(IterableDataset[Produced]):
    """In loader worker i, the stream whose turn it is: ``(first + i) % workers``."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        plans: list[Plan],
        batch_size: int,
        states: list[dict[str, int]],
        first: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._plans = plans
        self._batch_size = batch_size
        self._states = states
        self._first = first

    def __iter__(self) -> Iterator[Produced]:
        worker = get_worker_info()
        stream = (self._first + (worker.id if worker is not None else 0)) % len(self._plans)
        plan, state = self._plans[stream], self._states[stream]
        try:
            source = open_source(self._config)
        except DataError as error:
            yield Produced(None, state, (), str(error))
            return
        yield from produce(self._config, source, self._tokenizer, plan, self._batch_size, state)


def produce_in_workers(
    config: DataConfig,
    tokenizer: Tokenizer,
    plans: list[Plan],
    batch_size: int,
    states: list[dict[str, int]],
    first: int,
) -> Iterator[Produced]:
    """The batches of several streams in turn, each stream in a process of its own.

    Args:
        config: How documents become sequences; its ``workers`` equals the number of plans.
        tokenizer: Is sent to each worker.
        plans: One per stream.
        batch_size: Sequences per batch, B.
        states: Each stream's position.
        first: The stream whose turn is first.

    Returns:
        An iterator; dropping it ends the processes.
    """
    loader: DataLoader[Any] = DataLoader(
        _WorkerStreams(config, tokenizer, plans, batch_size, states, first),
        batch_size=None,
        num_workers=len(plans),
        collate_fn=_unchanged,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # Its own generator, so that starting workers draws nothing from the training's.
        generator=torch.Generator(),
    )
    return iter(loader)


def _unchanged(produced: Any) -> Any:
    return produced


def _leave_interrupts_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
