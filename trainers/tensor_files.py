"""Safetensors files: opened, and held against a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .missing import require


@contextmanager
def opened(*paths: Path) -> Iterator[dict[str, Any]]:
    """For each tensor's name the file that has it; later files count."""
    open_file = require("safetensors", "train").safe_open
    with ExitStack() as stack:
        files = [stack.enter_context(open_file(path, framework="pt")) for path in paths]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118


def difference(stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> str:
    """The first difference of a file's tensors from a network's; "" if there is none.

    Args:
        stored: shapes in the file, by name.
        wanted: shapes in the network.
    """
    wrong = sorted(stored.keys() ^ wanted.keys())
    if wrong:
        return f"{wrong[0]} is only in the {'file' if wrong[0] in stored else 'network'}"
    for name, shape in wanted.items():
        if list(stored[name]) != list(shape):
            return f"{name} is {list(stored[name])} in the file and {list(shape)} in the network"
    return ""
