// Runs CUDA kernels on the host: a thread of the operating system for each CUDA thread, one block
// after the other. For the tests, which compile device/*.cu with this in place of CUDA's runtime;
// sanitizers then see what kernels do with memory, and races between threads of a block.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

namespace simulator {

constexpr int kLanes = 32;

// Threads that have left a kernel no longer hold the others up, as on a GPU.
class Barrier {
 public:
  void reset(int expected) {
    expected_ = expected;
    waiting_ = 0;
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++waiting_ == expected_) return release();
    const long own = generation_;
    changed_.wait(lock, [&] { return generation_ != own; });
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--expected_ == waiting_ && waiting_ > 0) release();
  }

 private:
  void release() {
    waiting_ = 0;
    ++generation_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int expected_ = 0, waiting_ = 0;
  long generation_ = 0;
};

struct Warp {
  Barrier barrier;
  float slots[kLanes];
  int flags[kLanes];
};

struct Block {
  explicit Block(int threads) : warps(static_cast<std::size_t>(threads / kLanes)) {}
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Index {
  unsigned x;
};

inline thread_local Index thread_index{}, block_index{}, grid_size{};
inline thread_local Block* block = nullptr;

inline Warp& warp() { return block->warps[thread_index.x / kLanes]; }
inline unsigned lane() { return thread_index.x % kLanes; }

}  // namespace simulator

#define threadIdx simulator::thread_index
#define blockIdx simulator::block_index
#define gridDim simulator::grid_size

inline void __syncthreads() { simulator::block->barrier.wait(); }
inline void __syncwarp() { simulator::warp().barrier.wait(); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  simulator::Warp& warp = simulator::warp();
  warp.slots[simulator::lane()] = value;
  warp.barrier.wait();
  const float other = warp.slots[simulator::lane() ^ static_cast<unsigned>(offset)];
  warp.barrier.wait();
  return other;
}

inline bool __any_sync(unsigned, bool flag) {
  simulator::Warp& warp = simulator::warp();
  warp.flags[simulator::lane()] = flag;
  warp.barrier.wait();
  bool any = false;
  for (int lane = 0; lane < simulator::kLanes; ++lane) any = any || warp.flags[lane];
  warp.barrier.wait();
  return any;
}

namespace lowrank {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void*,
           Arguments... arguments) {
  simulator::Block block(threads);
  simulator::Barrier between;  // blocks
  between.reset(threads);
  const auto start = [&] {
    block.barrier.reset(threads);
    for (simulator::Warp& warp : block.warps) warp.barrier.reset(simulator::kLanes);
  };
  const auto run = [&](int thread) {
    simulator::thread_index.x = static_cast<unsigned>(thread);
    simulator::grid_size.x = static_cast<unsigned>(blocks);
    simulator::block = &block;
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (thread == 0) start();
      between.wait();
      simulator::block_index.x = static_cast<unsigned>(b);
      kernel(arguments...);
      simulator::warp().barrier.leave();
      block.barrier.leave();
      between.wait();
    }
  };
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread) all.emplace_back(run, thread);
  for (std::thread& one : all) one.join();
  return 0;
}

// Few, so that the blocks of small tests take several turns.
inline int multiprocessors() { return 1; }

}  // namespace lowrank
