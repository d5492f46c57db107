"""Formatting of numbers: bytes, counts, durations, losses."""

from __future__ import annotations

import math

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COUNT_UNITS = ("", "k", "M", "B", "T")
# exp() of more nats than this is not informative.
_MAX_NATS = 700.0
MISSING = "--"


def three_digits(value: float) -> str:
    """Writes a number of at least 0 with three significant digits and no exponent below 1e6."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_bytes(size: float | None) -> str:
    """Writes a size with a binary unit: 1536 -> "1.50 KiB".

    Args:
        size: Bytes; None reads as missing.
    """
    if size is None or not math.isfinite(size):
        return MISSING
    exponent = 0
    # 999.5, not 1024: "1010 MiB" is longer and no clearer than "0.99 GiB".
    while abs(size) >= 999.5 and exponent < len(_BYTE_UNITS) - 1:
        size /= 1024
        exponent += 1
    digits = f"{size:.0f}" if exponent == 0 else three_digits(size)
    return f"{digits} {_BYTE_UNITS[exponent]}"


def format_count(count: float | None) -> str:
    """Writes a count briefly: 1234567 -> "1.23M"; whole numbers below 1,000 stay whole."""
    if count is None or not math.isfinite(count):
        return MISSING
    if abs(count) < 1000 and float(count).is_integer():
        return str(int(count))
    exponent = 0
    while abs(count) >= 999.5 and exponent < len(_COUNT_UNITS) - 1:
        count /= 1000
        exponent += 1
    sign = "-" if count < 0 else ""
    return f"{sign}{three_digits(abs(count))}{_COUNT_UNITS[exponent]}"


def format_tick(value: float) -> str:
    """Writes a number on an axis, at most three digits and no trailing zeros: 8000 -> "8k"."""
    digits = format_count(value) if abs(value) >= 1000 else f"{value:.3g}"
    number, unit = (digits[:-1], digits[-1]) if digits[-1].isalpha() else (digits, "")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{unit}"


def format_duration(seconds: float | None) -> str:
    """Writes a duration: 75 -> "1:15", 3675 -> "1:01:15", two days -> "2d 03:00"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    if hour:
        return f"{hour}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}"


def format_seconds(seconds: float | None) -> str:
    """Writes a short time with its unit: 0.0123 -> "12.3 ms"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995e-3:
        return f"{three_digits(seconds * 1e6)} us"
    if seconds < 0.9995:
        return f"{three_digits(seconds * 1e3)} ms"
    return f"{three_digits(seconds)} s"


def format_loss(loss: float | None, digits: int = 3) -> str:
    """Writes a loss in nats; None reads as missing, a loss that is not finite by its name."""
    if loss is None:
        return MISSING
    return f"{loss:.{digits}f}"


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinity where that would overflow."""
    return math.exp(loss) if loss < _MAX_NATS else (loss if math.isnan(loss) else math.inf)


def format_perplexity(value: float | None) -> str:
    """Writes a perplexity: 23.4567 -> "23.46", 4155.2 -> "4,155", 2.5e9 -> "2.5e+09"."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value >= 1e6:
        return f"{value:.1e}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def format_value(value: object) -> str:
    """A setting's value: numbers in short, a pair in parentheses."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(format_value, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
