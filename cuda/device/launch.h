// Launching kernels: through CUDA's runtime, or through the simulator that the tests compile in.
#pragma once

#include "../core/common.h"

#if defined(LOWRANK_SIMULATOR)
#include "simulator.h"
#else
#include <cuda_runtime.h>

namespace lowrank {

// The error of a call as a number. The runtime also keeps it for the thread's next reader, who
// would take it for its own: this forgets it. An error that others left behind is left to them.
inline int reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
           const Arguments&... arguments) {
  if (blocks == 0) return 0;
  cudaLaunchConfig_t where = {};
  where.gridDim = dim3(static_cast<unsigned>(blocks));
  where.blockDim = dim3(static_cast<unsigned>(threads));
  where.stream = static_cast<cudaStream_t>(stream);
  // Says itself whether it failed; after <<<...>>> only the thread's last error is known, which may
  // be another library's.
  return reported(cudaLaunchKernelEx(&where, kernel, arguments...));
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (reported(cudaGetDevice(&device)) != 0) return 1;
  if (reported(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) != 0) {
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
// Blocks that fit on a multiprocessor at once, at least: half of its 2048 threads, with up to 64
// registers each. cuda/occupancy.py has each kernel's limit.
constexpr int kResident = 4;

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
