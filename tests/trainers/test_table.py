"""Numbers with their units, and the table that closes a run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import pytest
from rich.console import Console

from lowrank.trainers import units
from lowrank.trainers.table import summary_table

MIB = 2**20
SUMMARY: dict[str, object] = {
    "optimizer": "galore_adamw",
    "model": "llama_9m",
    "steps": 600,
    "tokens": 2_457_600,
    "initial_val_loss": 8.32,
    "val_loss": 4.16,
    "unigram_val_loss": 6.512,
    "val_perplexity": math.exp(4.16),
    "bits_per_byte": 1.75,
    "tokens_per_second": 7421.0,
    "optimizer_state_bytes": 32 * MIB,
    "adamw_state_bytes": 64 * MIB,
    "peak_memory_bytes": 955 * MIB,
    "wall_seconds": 331.0,
    "device": "cpu",
}


def rendered(summary: Mapping[str, object], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(summary_table(dict(summary)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_table_shows_start_end_and_what_to_hold_them_against() -> None:
    text = rendered(SUMMARY, 120)
    assert row(text, "Validation loss") == [
        "Validation loss",
        "8.320",
        "4.160",
        "2.35 nats below the unigram mark, 6.512",
    ]
    assert row(text, "Perplexity") == ["Perplexity", "4,105", "64.07"]
    assert row(text, "Bits per byte") == ["Bits per byte", "3.500", "1.750"]
    assert row(text, "Tokens per second")[1:] == ["7.42k", "600 steps 2.46M tokens in 5:31"]
    assert row(text, "Optimizer state")[1:] == ["32.0 MiB", "50% of AdamW's 64.0 MiB"]
    assert row(text, "Peak memory")[1:] == ["955 MiB", "cpu"]
    assert "Skipped" not in text


def test_table_fits_eighty_columns() -> None:
    lines = rendered({**SUMMARY, "steps": 20_000}, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "2.35 nats below the unigram mark, 6.512" in "\n".join(lines)


def test_table_says_when_the_mark_is_not_beaten() -> None:
    assert "0.49 nats ABOVE" in " ".join(rendered({**SUMMARY, "val_loss": 7.0}, 120).split())


def test_table_names_skipped_steps() -> None:
    assert row(rendered({**SUMMARY, "skipped_steps": 3}, 120), "Skipped steps")[1] == "3"


def test_table_of_an_empty_summary_reads_as_missing() -> None:
    text = rendered({"val_loss": None, "bits_per_byte": "soon", "adamw_state_bytes": 5})
    assert text.count("--") >= 6
    assert "of AdamW's" not in text


def test_brackets_in_a_name_are_text() -> None:
    assert "[red]x[/red]" in rendered({**SUMMARY, "model": "[red]x[/red]"})


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (955 * MIB, "955 MiB"),
        (1010 * MIB, "0.99 GiB"),
        (78.5 * 2**30, "78.5 GiB"),
        (None, "--"),
        (math.nan, "--"),
    ],
)
def test_bytes(size: float | None, text: str) -> None:
    assert units.format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (12345, "12.3k"),
        (999600, "1.00M"),
        (7e9, "7.00B"),
        (0.5, "0.50"),
        (-1500, "-1.50k"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert units.format_count(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (8000, "8k"),
        (1500, "1.5k"),
        (0.005, "0.005"),
        (20, "20"),
        (100, "100"),
        (1e5, "100k"),
        (2e6, "2M"),
        (0.25, "0.25"),
    ],
)
def test_ticks(value: float, text: str) -> None:
    assert units.format_tick(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (75.4, "1:15"),
        (3675, "1:01:15"),
        (183600, "2d 03:00"),
        (None, "--"),
        (math.inf, "--"),
        (-3, "0:00"),
        (59.7, "1:00"),
        (90000, "1d 01:00"),
        (86400, "1d 00:00"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (2.5e-5, "25.0 us"),
        (0.0123, "12.3 ms"),
        (0.9999, "1.00 s"),
        (125, "125 s"),
    ],
)
def test_short_times(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (23.4567, "23.46"),
        (167.94, "167.9"),
        (4155.2, "4,155"),
        (2.5e9, "2.5e+09"),
        (math.inf, "inf"),
        (None, "--"),
    ],
)
def test_perplexities(value: float | None, text: str) -> None:
    assert units.format_perplexity(value) == text


def test_perplexity_never_overflows() -> None:
    assert units.perplexity(1e6) == math.inf
    assert math.isnan(units.perplexity(math.nan))
    assert units.perplexity(1.0) == pytest.approx(math.e)
