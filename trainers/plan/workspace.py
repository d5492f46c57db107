"""Memory that kernels allocate for themselves, which no operation returns."""

from __future__ import annotations

from typing import Any


def workspace_bytes(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation holds beside its results while it runs; 0 for most."""
    return 0
