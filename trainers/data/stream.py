"""The training data as an endless, exactly resumable stream of batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from .config import Batch, DataConfig
from .cursor import Position
from .errors import DataError, DataWarning, FirstFew
from .order import Plan
from .producer import Produced, produce, produce_in_workers
from .records import Record
from .source import open_source
from .tokenizer import Tokenizer

# 1: documents with NULs were trained on, those with characters beyond ASCII in gzip files were not,
# and turns began anew with each shard.
_VERSION = 2
_OLDEST = 1


class TrainingStream:
    """One rank's training batches.

    After any batch, `state_dict` holds the exact position; a stream that loads it goes on with
    the very batches that would have followed, in the middle of a document too, and with several
    workers.

    Args:
        config: The data and how it is cut.
        tokenizer: Turns it into ids.
        batch_size: Sequences per batch, B.
        seed: Of the order of shards and documents.
        rank: This process's number.
        world_size: How many processes share the data.
        on_warning: Takes one sentence for each of the first few files of which something was
            passed over, and on rank 0 one about files that aren't read at all; by default it is
            issued as a `DataWarning`.

    Raises:
        ValueError: If an argument is out of range or the data can't be used.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        check_split(batch_size, rank, world_size)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self._config = config
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._source = open_source(config)
        count = max(config.workers, 1)
        self._plans = [
            Plan(
                seed=seed,
                stream=rank * count + worker,
                streams=world_size * count,
                shards=len(self._source.shards("train")),
                block=config.shuffle_block,
            )
            for worker in range(count)
        ]
        self._identity: dict[str, Any] = {
            "data": self._source.fingerprint(),
            "tokenizer": tokenizer.fingerprint,
            "sequence_length": config.sequence_length,
            "packing": config.packing,
            "shuffle_block": config.shuffle_block,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "workers": config.workers,
        }
        report = on_warning or _warn
        self._on_warning = report
        self._on_bad_file = FirstFew(report)
        self._rotated: bool | None = None
        ignored = getattr(self._source, "ignored", "")
        if ignored and rank == 0:
            report(ignored)
        self._states = [Position().state() for _ in self._plans]
        self._next = 0
        self._produced: Iterator[Produced] | None = None
        self._ahead: Produced | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def prefetch(self) -> None:
        """Makes the next batch already, so that data of no use are found before a run begins.

        Raises:
            DataError: If there is no such batch; the one line says why, and no warning beside it.
        """
        if self._ahead is None:
            self._ahead = self._produce()
        if self._ahead.batch is None:
            error = self._ahead.error
            self.close()
            raise DataError(error or "the data stream can't go on")

    def _produce(self) -> Produced:
        if self._produced is None:
            self._produced = self._start()
        try:
            return next(self._produced)
        except StopIteration:
            raise DataError("the data stream has ended after an error") from None

    def __next__(self) -> Batch:
        produced = self._ahead or self._produce()
        self._ahead = None
        for message in produced.warnings:
            self._on_bad_file(message)
        if produced.batch is None:
            self.close()
            raise DataError(produced.error or "the data stream can't go on")
        self._states[self._next] = produced.state
        self._next = (self._next + 1) % len(self._plans)
        return produced.batch

    @property
    def epoch(self) -> int:
        """Passes over the data that all of this rank's streams have completed."""
        return min(state["epoch"] for state in self._states)

    @property
    def skipped_documents(self) -> int:
        """Records this rank has passed over so far, once for each epoch that met them."""
        return sum(state["skipped"] for state in self._states)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch: plain numbers, strings and lists.

        Returns:
            What `load_state_dict` takes; ``torch.load(..., weights_only=True)`` reads it back.
        """
        return {
            "version": _VERSION,
            "rotated": self._turns_go_on(),
            **{key: dict(v) if isinstance(v, dict) else v for key, v in self._identity.items()},
            "next": self._next,
            "streams": [dict(state) for state in self._states],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Args:
            state: From `state_dict` of a stream with the same settings on the same data.

        Raises:
            ValueError: If the data, the tokenizer or a setting that decides the order differs.
        """
        version = state.get("version") if isinstance(state, dict) else None
        if version not in (_OLDEST, _VERSION):
            raise ValueError(
                f"the saved data position must be one of version {_VERSION}, got {_short(state)}"
            )
        for key, now in self._identity.items():
            saved = state.get(key)
            if saved != now:
                raise ValueError(
                    f"the data can't be resumed exactly: {key} was {_named(saved)} "
                    f"and is {_named(now)} now"
                )
        positions = state.get("streams")
        turn = state.get("next")
        if not isinstance(positions, list) or len(positions) != len(self._plans):
            raise ValueError(f"the saved data position must have {len(self._plans)} streams")
        if not isinstance(turn, int) or not 0 <= turn < len(self._plans):
            raise ValueError(f"the saved data position has no valid next stream: {turn!r}")
        loaded = [Position.from_state(position).state() for position in positions]
        self.close()
        self._states, self._next = loaded, turn
        self._rotated = bool(state.get("rotated", False))
        if version == _OLDEST and self._config.source != "stdlib":
            self._on_warning(
                "the run was begun by an earlier version, which trained on documents with NUL "
                "characters and skipped accented ones in gzip files; now it is the other way "
                "round, so where the data hold any, the run goes on with other batches"
            )

    def close(self) -> None:
        """End the loader processes; a stream that is asked for more starts them again."""
        self._produced = self._ahead = None

    def _turns_go_on(self) -> bool:
        """Whether streams' turns go on from shard to shard, see `Plan`; found out when needed."""
        if self._rotated is None:
            plan, shards = self._plans[0], self._source.shards("train")
            shared = bool(shards) and not plan.whole_shards
            self._rotated = shared and not _has(self._source.records(shards[0]), plan.streams)
        return self._rotated

    def _start(self) -> Iterator[Produced]:
        rotated = self._turns_go_on()
        self._plans = [replace(plan, rotated=rotated) for plan in self._plans]
        if self._config.workers > 0:
            return produce_in_workers(
                self._config,
                self._tokenizer,
                self._plans,
                self._batch_size,
                [dict(state) for state in self._states],
                self._next,
            )
        return produce(
            self._config,
            self._source,
            self._tokenizer,
            self._plans[0],
            self._batch_size,
            self._states[0],
        )


def check_split(batch_size: int, rank: int, world_size: int) -> None:
    """Check a batch size and a process's place among the others.

    Raises:
        ValueError: If one is out of range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("rank", rank, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size, got rank {rank} of {world_size}")


def _has(records: Iterator[Record], count: int) -> bool:
    """Whether there are at least so many."""
    return sum(1 for _ in islice(records, count)) == count


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)


def _named(value: object) -> str:
    if isinstance(value, dict) and "sha256" in value:
        python = f" of Python {value['python']}" if "python" in value else ""
        return f"{value.get('source')!r}{python} {str(value['sha256'])[:12]}"
    return repr(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
