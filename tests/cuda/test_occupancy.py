"""What kernels take of a multiprocessor, as the compiler reports it."""

from __future__ import annotations

import os
import re

import pytest

from lowrank.cuda import build
from lowrank.cuda.library import FOLDER
from lowrank.cuda.occupancy import LIMITS, RARE, Usage, read

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7lowrank11flat_kernelIfLi16EEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN7lowrank11flat_kernelIfLi16EEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 98 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Function properties for __cuda_sm3x_div_rn_noftz_f32_slowpath
    0 bytes stack frame, 20 bytes spill stores, 20 bytes spill loads
ptxas info    : Compiling entry function '_Z4signPf' for 'sm_80'
ptxas info    : Function properties for _Z4signPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read() -> None:
    first, second = read(PTXAS)
    assert first == Usage("_ZN7lowrank11flat_kernelIfLi16EEEvPT_", "sm_90a", 98, 12, 2048)
    assert (first.name, first.limit, first.blocks) == ("flat_kernel", 64, 2)
    assert "spills 12 bytes" in first.problem()
    assert (second.name, second.spill_bytes, second.shared_bytes) == ("_Z4signPf", 0, 0)
    assert "has no limit" in second.problem()
    within = (
        "_ZN7lowrank39_GLOBAL__N__22030a21_7_adam_cu_c378742311rows_kernelIfLi472EEEvNS0_7TensorsE"
    )
    assert Usage(within, "sm_80", 1).name == "rows_kernel"
    # A hash that ends with the length of all that follows it.
    hashed = "_ZN7lowrank46_GLOBAL__N__1f2f6142_8_noise_cu_1f2f617720gaussian_list_kernelEv"
    assert Usage(hashed, "sm_80", 1).name == "gaussian_list_kernel"


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(32, 0, 8), (33, 0, 6), (64, 0, 4), (65, 0, 3), (128, 0, 2), (32, 27664, 5), (24, 49152, 3)],
)
def test_blocks_of_a_multiprocessor(registers: int, shared: int, blocks: int) -> None:
    usage = Usage("_Z11flat_kernelv", "sm_80", registers, 0, shared)
    assert usage.blocks == blocks
    assert usage.occupancy == blocks / 8
    assert bool(usage.problem()) == (registers > 64)


def test_rare_kernels_have_limits_of_their_own() -> None:
    symbol = "_ZN7lowrank17write_int8_kernelINS0_6UpdateINS0_7AnyTypeES3_lEEEEvPh"
    assert Usage(symbol, "sm_80", 80).problem() == ""
    usual = symbol.replace("7AnyType", "8bfloat16")
    assert "takes 80 registers, 64 are its limit" in Usage(usual, "sm_80", 80).problem()


def test_every_kernel_has_a_limit() -> None:
    text = "".join(path.read_text() for path in (build.SOURCES / "device").glob("*.cu"))
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\(.*\)\s+)?(\w+)\(", text)
    assert set(kernels) == set(LIMITS)
    assert {name for name, _ in RARE} <= set(LIMITS)


@pytest.mark.skipif(
    build.find_nvcc() is None or os.environ.get("LOWRANK_CUDA") == "0",
    reason="there is no nvcc, or it isn't to be used",
)
def test_kernels_are_within_their_limits_and_compile_without_warnings() -> None:
    """Half of a multiprocessor's threads for all but the rare ones, and nothing is spilled."""
    report = build.read_report(FOLDER)
    assert report["cuda"]["built"], report["cuda"]["reason"]
    assert report["digest"] == build.digest(), "the libraries are of other sources"
    said = (FOLDER / build.SAID).read_text()
    assert [line for line in said.splitlines() if "warning" in line] == []
    found = read(said)
    assert {usage.target for usage in found} == {f"sm_{arch}" for arch in build.architectures()}
    assert {usage.name for usage in found} == set(LIMITS)
    assert [problem for usage in found if (problem := usage.problem())] == []
    assert all(usage.occupancy >= 0.5 or usage.limit == 96 for usage in found)
