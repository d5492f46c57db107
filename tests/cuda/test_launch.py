"""What a launch makes of errors: its own are reported and forgotten, others' are left to them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lowrank.cuda import build

#: A runtime with the behaviour that CUDA documents: calls return their error, and keep it as the
#: thread's last one until somebody reads it.
RUNTIME = """
#pragma once
#include <cstddef>
#include <utility>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorForeign = 999 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned width = 1) : x(width) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t kept(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return last_error; }
inline cudaError_t cudaGetDevice(int*) { return kept(cudaErrorForeign); }
inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* where, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (where->blockDim.x > 1024) return kept(cudaErrorInvalidConfiguration);
  kernel(std::forward<Arguments>(arguments)...);
  return cudaSuccess;
}
"""

PROGRAM = """
#include "device/launch.h"

namespace {
int runs = 0;
void kernel(int count, const float* data) { runs += count + (data == nullptr); }
float* const kNone = nullptr;

int check() {
  using lowrank::launch;
  if (launch(kernel, 1, 256, nullptr, 3, kNone) != 0 || runs != 4) return 1;
  // Somebody else failed before: not our error, and theirs to find.
  last_error = cudaErrorForeign;
  if (launch(kernel, 1, 256, nullptr, 3, kNone) != 0 || runs != 8) return 2;
  if (cudaGetLastError() != cudaErrorForeign) return 3;
  // Our own error is returned, and nobody finds it afterwards.
  if (launch(kernel, 1, 2048, nullptr, 3, kNone) != cudaErrorInvalidConfiguration) return 4;
  if (runs != 8 || cudaPeekAtLastError() != cudaSuccess) return 5;
  if (launch(kernel, 0, 2048, nullptr, 3, kNone) != 0 || runs != 8) return 6;
  if (lowrank::multiprocessors() != 1 || cudaPeekAtLastError() != cudaSuccess) return 7;
  return 0;
}
}  // namespace

int main() { return check(); }
"""


@pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")
def test_whose_error_it_is(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    include = [f"-I{tmp_path}", f"-I{build.SOURCES}"]
    build.run([compiler, "-std=c++20", *include, str(source), "-o", str(program)])
    assert subprocess.run([program], check=False).returncode == 0
