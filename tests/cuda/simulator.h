// Runs CUDA kernels on the host, one block after the other. For the tests, which compile
// device/*.cu with this in place of CUDA's runtime; sanitizers then see what kernels do with
// memory, and races between threads of a block.
//
// A CUDA thread is a fiber (fibers.h), or a thread of the operating system (threads.h) where races
// are looked for. Both define the block's and the thread's indices, `Barrier`, whose `wait` returns
// when all threads that have not left it are there, and `run_block(threads, body)`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(SIMULATOR_THREADS)
#include "threads.h"
#else
#include "fibers.h"
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__ &  // not copied for each thread

namespace simulator {

constexpr int kLanes = 32;

// What the lanes of a warp show each other. They write into two rows in turn: a lane that is ahead
// can't write over what others still have to read.
struct Warp {
  Barrier barrier;
  std::uint32_t rows[2][kLanes];
  int turns[kLanes] = {};
};

struct Block {
  explicit Block(int threads) : warps(static_cast<std::size_t>(threads / kLanes)) {}
  Barrier barrier;
  std::vector<Warp> warps;
};

inline Block* block = nullptr;

inline Warp& warp() { return block->warps[thread_index.x / kLanes]; }
inline unsigned lane() { return thread_index.x % kLanes; }

// The patterns of all lanes' values.
template <typename T>
const std::uint32_t* shown(T value) {
  static_assert(sizeof(T) == sizeof(std::uint32_t));
  Warp& own = warp();
  std::uint32_t* row = own.rows[own.turns[lane()]++ % 2];
  std::memcpy(row + lane(), &value, sizeof(value));
  own.barrier.wait();
  return row;
}

template <typename T>
T read(std::uint32_t pattern) {
  T value;
  std::memcpy(&value, &pattern, sizeof(value));
  return value;
}

}  // namespace simulator

#define threadIdx simulator::thread_index
#define blockIdx simulator::block_index
#define gridDim simulator::grid_size

inline void __syncthreads() { simulator::block->barrier.wait(); }
inline void __syncwarp() { simulator::warp().barrier.wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  const unsigned other = simulator::lane() ^ static_cast<unsigned>(offset);
  return simulator::read<T>(simulator::shown(value)[other]);
}

inline std::int32_t __reduce_max_sync(unsigned, std::int32_t value) {
  const std::uint32_t* all = simulator::shown(value);
  for (int lane = 0; lane < simulator::kLanes; ++lane) {
    value = std::max(value, simulator::read<std::int32_t>(all[lane]));
  }
  return value;
}

inline bool __any_sync(unsigned, bool flag) {
  const std::uint32_t* flags = simulator::shown(static_cast<int>(flag));
  bool any = false;
  for (int lane = 0; lane < simulator::kLanes; ++lane) any = any || flags[lane] != 0;
  return any;
}

namespace lowrank {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void*,
           const Arguments&... arguments) {
  simulator::grid_size.x = static_cast<unsigned>(blocks);
  for (std::int64_t b = 0; b < blocks; ++b) {
    simulator::Block own(threads);
    own.barrier.reset(threads);
    for (simulator::Warp& warp : own.warps) warp.barrier.reset(simulator::kLanes);
    simulator::block = &own;
    simulator::block_index.x = static_cast<unsigned>(b);
    simulator::run_block(threads, [&] {
      kernel(arguments...);
      simulator::warp().barrier.leave();
      own.barrier.leave();
    });
  }
  return 0;
}

// Few, so that the blocks of small tests take several turns.
inline int multiprocessors() { return 1; }

}  // namespace lowrank
