"""Handling of SIGTERM: the current step is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Terminated(Exception):
    """The run was asked to end and has saved itself.

    Attributes:
        step: optimizer steps done.
        checkpoint: the checkpoint it wrote.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"ended by SIGTERM after step {step}; saved {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


class Wish:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.came = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        self.came = True


@contextmanager
def catch_termination(*, alone: bool = True) -> Iterator[Wish]:
    """Turns SIGTERM into a flag while the block runs; outside the main thread nothing changes.

    Args:
        alone: whether this is the run's only process. With others, an error that leaves the block
            may come of a lost process, for which torchrun sends SIGTERM at once: the flag stays
            in place, for `distributed.join` to remove.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = signal.signal(signal.SIGTERM, wish.note)
    try:
        yield wish
    except BaseException:
        if alone:
            signal.signal(signal.SIGTERM, before)
        raise
    signal.signal(signal.SIGTERM, before)
