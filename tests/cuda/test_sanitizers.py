"""The kernels under sanitizers: memory, undefined behaviour, races; and that these find faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import caching_compiler
from representative import with_representative

from lowrank.cuda import build

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def runtime(name: str) -> str | None:
    """A sanitizer's library, if the compiler has one."""
    compiler = build.find_compiler()
    found = build.run([compiler, f"-print-file-name={name}"]).strip() if compiler else name
    return found if Path(found).is_absolute() else None


needs_asan = pytest.mark.skipif(
    runtime("libasan.so") is None, reason="the compiler has no AddressSanitizer"
)


@pytest.mark.slow
@needs_asan
def test_kernels_under_address_and_undefined_behaviour_sanitizers() -> None:
    """Host kernels and simulated device kernels with buffers of exact size."""
    preload = " ".join(filter(None, (runtime("libasan.so"), runtime("libubsan.so"))))
    environment = os.environ | {
        "LOWRANK_TEST_SANITIZE": "1",
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
        "LOWRANK_TEST_EXAMPLES": "4",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "slow or not slow", "tests/cuda/test_native.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


PLANTED = """
#include <cstdlib>
#include "simulator.h"

// What a lane does after it has waited for others, and on a stack of its own.
__global__ void kernel(int fault, float* data) {
  float own[8] = {};
  own[threadIdx.x % 8] = 1.0f;
  __syncthreads();
  const int at = static_cast<int>(threadIdx.x) % 8 + (fault == 1 && threadIdx.x == 77 ? 8 : 0);
  volatile float* entries = own;
  float sum = entries[at];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (fault == 2 && threadIdx.x == 5) data[256] = sum;
  if (fault == 3 && threadIdx.x % 32 == 3) return __syncthreads();
  if (fault == 3) __syncwarp();
  __syncthreads();
  data[threadIdx.x] = sum;
}

int main(int, char** arguments) {
  float* data = new float[256];
  lowrank::launch(kernel, 3, 256, nullptr, std::atoi(arguments[1]), data);
  const bool right = data[0] == 32.0f && data[255] == 32.0f;
  delete[] data;
  return right ? 0 : 1;
}
"""


@pytest.mark.slow
@needs_asan
def test_faults_in_simulated_kernels_are_found(tmp_path: Path) -> None:
    """Beyond a lane's array, beyond a buffer, and barriers that don't meet."""
    compiler = build.find_compiler()
    assert compiler is not None
    source, program = tmp_path / "planted.cpp", tmp_path / "planted"
    source.write_text(PLANTED)
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", f"-I{HERE}"]
    build.run([compiler, *flags, str(source), "-o", str(program)])
    expected = ("", "stack-buffer-overflow", "heap-buffer-overflow", "threads wait at a barrier")
    for fault, words in enumerate(expected):
        done = subprocess.run([program, str(fault)], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (fault == 0), (fault, done.stderr[-2000:])
        assert words in done.stderr


#: Where a barrier keeps threads of a block apart: text of adam8bit.cu that the fault leaves out.
BARRIER = "stage(shared_maps, maps, 2 * 256);\n  __syncthreads();"


@pytest.mark.skipif(runtime("libtsan.so") is None, reason="the compiler has no ThreadSanitizer")
@pytest.mark.parametrize("broken", with_representative((False, True), (False,)))
def test_no_kernel_has_a_race(tmp_path: Path, broken: bool) -> None:
    """ThreadSanitizer on simulated kernels; with a barrier taken away it must complain."""
    compiler = build.find_compiler()
    assert compiler is not None
    device = build.SOURCES / "device"
    sources = [path for path in sorted(device.glob("*.cu")) if path.stem != "library"]
    if broken:
        text = (device / "adam8bit.cu").read_text()
        changed = tmp_path / "adam8bit.cu"
        changed.write_text(text.replace(BARRIER, ""))
        assert changed.read_text() != text
        sources[sources.index(device / "adam8bit.cu")] = changed
    sources += [HERE / "races.cpp", build.SOURCES / "host/library.cpp"]
    flags = [
        *("-std=c++20", "-O0", "-g1", "-fsanitize=thread", "-pthread", "-Wno-unknown-pragmas"),
        *("-DLOWRANK_SIMULATOR", "-DSIMULATOR_THREADS", f"-I{HERE}", f"-I{device}", "-x", "c++"),
    ]
    objects = build.compile_objects(caching_compiler(compiler), flags, sources, tmp_path)
    program = str(tmp_path / "races")
    build.run([compiler, "-fsanitize=thread", "-pthread", *objects, "-o", program])
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == broken, said[-4000:]
    assert ("data race" in said) == broken
