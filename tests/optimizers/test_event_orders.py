"""Whatever happens in whatever order, saving, loading and copying change nothing of a training."""

from __future__ import annotations

import warnings

import pytest
from event_orders import Event, Setting, check, events_of, settings_of
from hypothesis import Phase, given, settings
from table import Row, every, representative

#: The same examples in every run: a test that fails by chance is of no use to others.
_FIXED = {"deadline": None, "derandomize": True, "phases": (Phase.generate,)}


@representative
def test_any_order_of_events(row: Row) -> None:
    _hold(row, examples=5)


@pytest.mark.slow
@every
def test_many_orders_of_events(row: Row) -> None:
    _hold(row, examples=15)


def _hold(row: Row, examples: int) -> None:
    @settings(max_examples=examples, **_FIXED)
    @given(setting=settings_of, events=events_of)
    def held(setting: Setting, events: list[Event]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(row, setting, events)

    held()
