"""What the device's kernels take of a multiprocessor: what ptxas reports, and each one's limit.

A kernel that moves bytes needs half of a multiprocessor's threads to keep its memory busy: four
blocks of 256 threads, with up to 64 registers a thread and a quarter of the shared memory each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THREADS = 256  # of a block
#: Of a multiprocessor of compute capability 8.0 and 9.0.
REGISTERS, RESIDENT_THREADS = 1 << 16, 2048
#: Bytes of shared memory of a multiprocessor of 8.0, which has less than 9.0; and what the system
#: takes of each block.
SHARED, RESERVED = 164 << 10, 1 << 10

#: Most registers of a thread of each kernel in cuda/device. 64 fit half of the threads.
LIMITS = {
    "probe_kernel": 32,
    "flat_kernel": 64,
    "rows_kernel": 64,
    "columns_kernel": 64,
    "weights_kernel": 64,
    "adam_8bit_kernel": 64,
    "quantize_blocks_kernel": 56,
    "dequantize_blocks_kernel": 48,
    "quantize_groups_kernel": 64,
    "dequantize_groups_kernel": 56,
    "dequantize_groups_list_kernel": 56,
    "quantize_int4_kernel": 64,
    "dequantize_int4_kernel": 56,
    "dequantize_int4_list_kernel": 56,
    "rademacher_kernel": 48,
    "gaussian_kernel": 64,
    "gaussian_list_kernel": 64,
    "round_stochastic_kernel": 48,
    "step_seeds_kernel": 48,
    "limit_growth_kernel": 64,
    "cautious_rows_kernel": 64,
    "write_kernel": 64,
    "write_list_kernel": 64,
    "write_stochastic_kernel": 64,
    "write_int8_kernel": 64,
    "write_int4_kernel": 64,
}
#: Kernels for what is rare, with a limit of their own: a quantised weight's update of types that
#: are only known when it runs, or without a direction.
RARE = {
    (kernel, types): 96
    for kernel in ("write_int8_kernel", "write_int4_kernel")
    for types in ("AnyType", "UpdateINS0_7Missing")
}

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes, compiled for one target.

    Attributes:
        symbol: its mangled name.
        target: such as "sm_90a".
        registers: of a thread.
        spill_bytes: written to and read from local memory for lack of registers.
        shared_bytes: of a block.
    """

    symbol: str
    target: str
    registers: int
    spill_bytes: int = 0
    shared_bytes: int = 0

    @property
    def name(self) -> str:
        """The kernel's name, without its template's arguments."""
        # The last that fits: the file's name and hashes come before it.
        for digits in reversed([*re.finditer(r"\d+", self.symbol)]):
            for start in range(len(digits[0])):  # a hash before it may end with digits
                name = self.symbol[digits.end() :][: int(digits[0][start:])]
                if name.endswith("_kernel") and len(name) == int(digits[0][start:]):
                    return name
        return self.symbol

    @property
    def limit(self) -> int | None:
        """Most registers that it may take; None for a kernel that `LIMITS` lacks."""
        for (name, part), limit in RARE.items():
            if name == self.name and part in self.symbol:
                return limit
        return LIMITS.get(self.name)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor of compute capability 8.0 has at once."""
        # Registers are given to warps in units of 256.
        warp = -(-32 * self.registers // 256) * 256
        by_registers = REGISTERS // (warp * THREADS // 32) if warp else 1 << 16
        by_shared = SHARED // (self.shared_bytes + RESERVED)
        return min(by_registers, by_shared, RESIDENT_THREADS // THREADS)

    @property
    def occupancy(self) -> float:
        """Share of the threads that a multiprocessor can have."""
        return self.blocks * THREADS / RESIDENT_THREADS

    def problem(self) -> str:
        """What is wrong with it, in words; empty for nothing."""
        if self.limit is None:
            return f"{self.name} has no limit in cuda/occupancy.py"
        if self.spill_bytes:
            return f"{self.name} ({self.target}) spills {self.spill_bytes} bytes: {self.symbol}"
        if self.registers > self.limit:
            return (
                f"{self.name} ({self.target}) takes {self.registers} registers, {self.limit} are "
                f"its limit: {self.symbol}"
            )
        return ""


def read(text: str) -> list[Usage]:
    """What `ptxas -v` says of each kernel."""
    found: list[Usage] = []
    entry: tuple[str, str] | None = None
    spilled = 0
    for line in text.splitlines():
        if begins := _ENTRY.search(line):
            entry, spilled = (begins[1], begins[2]), 0
        elif spills := _SPILLS.search(line):
            spilled = int(spills[2]) + int(spills[3])
        elif entry and (used := _USED.search(line)):
            shared = _SHARED.search(line)
            found.append(Usage(*entry, int(used[1]), spilled, int(shared[1]) if shared else 0))
            entry = None
    return found
