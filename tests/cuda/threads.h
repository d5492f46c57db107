// The simulator's CUDA threads as threads of the operating system: slow, but ThreadSanitizer sees
// which of them no barrier keeps apart.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace simulator {

struct Index {
  unsigned x;
};

inline thread_local Index thread_index{};
inline Index block_index{}, grid_size{};

// Threads that have left a kernel no longer hold the others up, as on a GPU.
class Barrier {
 public:
  void reset(int expected) { expected_ = expected; }

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

template <typename Body>
void run_block(int threads, const Body& body) {
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread) {
    all.emplace_back([&body, thread] {
      thread_index.x = static_cast<unsigned>(thread);
      body();
    });
  }
  for (std::thread& one : all) one.join();
}

}  // namespace simulator
