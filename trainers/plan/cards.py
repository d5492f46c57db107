"""Sizes of memory: of graphics cards by name, and as people write them."""

from __future__ import annotations

import difflib
import re

#: Memory of cards in MiB, as their drivers report it.
CARDS: dict[str, int] = {
    "3060": 12288,
    "3070": 8192,
    "3080": 10240,
    "3080-12GB": 12288,
    "3090": 24576,
    "4060": 8188,
    "4060-Ti-16GB": 16380,
    "4070": 12282,
    "4080": 16376,
    "4090": 24564,
    "5070": 12227,
    "5080": 16303,
    "5090": 32607,
    "A10": 23028,
    "A40": 46068,
    "A100-40GB": 40960,
    "A100-80GB": 81920,
    "A5000": 24564,
    "A6000": 49140,
    "B200": 183359,
    "H100": 81559,
    "H200": 143771,
    "L4": 23034,
    "L40S": 46068,
    "RTX-6000-Ada": 49140,
    "T4": 15360,
    "V100-16GB": 16384,
    "V100-32GB": 32768,
}

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
#: Fewer bytes than this, said without a unit, are a slip.
_LEAST = 1_000_000
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def card_bytes(name: str) -> int:
    """The memory of a card, such as "4090", "RTX 4090", "H100" or "A100-40GB".

    Raises:
        ValueError: as `card_name`.
    """
    return CARDS[card_name(name)] << 20


def card_name(name: str) -> str:
    """A card's name as `CARDS` has it.

    Raises:
        ValueError: it isn't known, or comes in several sizes; the message names the known ones.
    """
    wanted = _plain(name)
    for known in CARDS:
        if _plain(known) == wanted:
            return known
    starting = [known for known in CARDS if wanted and _plain(known).startswith(wanted)]
    if starting:
        raise ValueError(f"card={name!r} comes as {', '.join(starting)}: accepted is one of these")
    close = difflib.get_close_matches(name, CARDS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"card={name!r} is not known; {hint}accepted are {', '.join(CARDS)}; or give its memory"
    )


def _plain(name: str) -> str:
    letters = re.sub(r"[^A-Z0-9]", "", name.upper())
    return re.sub(r"^(NVIDIA)?(GEFORCE|TESLA)?(RTX)?(?=[0-9]{4}$|[0-9]{4}TI|[A-Z])", "", letters)


def memory_bytes(text: str | int) -> int:
    """Bytes from "16GB" (10^9 bytes each), "16GiB" (2^30), "800MB", or a number of bytes.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        found: float = text
    else:
        match = _FORM.fullmatch(str(text))
        unit = match.group(2).upper() if match else None
        if match is None or unit not in _UNITS:
            raise ValueError(
                f"memory={text!r}: accepted are sizes such as 16GB, 16GiB, 800MB or a number of "
                "bytes"
            )
        found = float(match.group(1)) * _UNITS[unit]
        if not unit and 1 <= found < _LEAST:
            raise ValueError(f"memory={text!r} has no unit: accepted are {text}GB or {text}GiB")
    if found < 1:
        raise ValueError(f"memory={text!r}: accepted are sizes above 0")
    return int(found)
