// Launching kernels: through CUDA's runtime, or through the simulator that the tests compile in.
#pragma once

#include "../core/common.h"

#if defined(LOWRANK_SIMULATOR)
#include "simulator.h"
#else
#include <cuda_runtime.h>

namespace lowrank {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
           Arguments... arguments) {
  if (blocks == 0) return 0;
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  return static_cast<int>(cudaGetLastError());
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

}  // namespace lowrank
#endif

namespace lowrank {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

LR_HD std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks for `warps` pieces of work that warps take in turn: at most `resident` a multiprocessor.
inline std::int64_t blocks_for(std::int64_t warps, int resident = 8) {
  const std::int64_t needed = ceil_divide(warps, kWarps);
  const std::int64_t most = static_cast<std::int64_t>(multiprocessors()) * resident;
  return needed < most ? needed : most;
}

// Calls f with a null pointer of the type that a code stands for.
template <typename F>
int dispatch(int dtype, const F& f) {
  if (dtype == kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == kBfloat16) return f(static_cast<bfloat16*>(nullptr));
  if (dtype == kFloat16) return f(static_cast<float16*>(nullptr));
  return 1;  // cudaErrorInvalidValue
}

}  // namespace lowrank
