"""Settings of every test: few threads, no network, seeds."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import forked
import pytest
from compiling import OBJECTS
from seeding import seed_generators


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what is compiled; the processes of one session share it."""
    if OBJECTS in os.environ:
        return
    folder = os.environ[OBJECTS] = tempfile.mkdtemp(prefix="lowrank-objects-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.add_cleanup(lambda: os.environ.pop(OBJECTS, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with one while others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Has the server of processes load what the selected tests need, see `forked`."""
    for module in {getattr(item, "module", None) for item in session.items}:
        forked.load(getattr(module, "PRELOAD", ()))
    forked.freeze()  # thousands of tests
    return (yield)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed_generators(0)
