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
def catch_termination() -> Iterator[Wish]:
    """Turns SIGTERM into a flag while the block runs; outside the main thread nothing changes."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = signal.signal(signal.SIGTERM, wish.note)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGTERM, before)
