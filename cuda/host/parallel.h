// Loops over blocks of work on several threads. Threads of our own: a second OpenMP runtime beside
// PyTorch's would spin against it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "../core/common.h"

namespace lowrank {

int threads();

// What an entry takes, in units of about 0.4 ns.
enum Cost : std::int64_t { kCopied = 1, kRounded = 2, kRequantised = 4, kComputed = 8 };

// Calls body(begin, end) on parts of [0, count), each of which is worth a thread's start. That
// takes 20 microseconds, and as much again until the thread has its data: parts take 0.4 ms or
// more, and less than two of them stay on the calling thread.
template <typename Body>
void parallel_for(std::int64_t count, std::int64_t entries_each, Cost cost, const Body& body) {
  constexpr std::int64_t kWorthAThread = 1 << 20;
  const std::int64_t worth = count * std::max<std::int64_t>(entries_each, 1) * cost / kWorthAThread;
  const std::int64_t parts = std::max<std::int64_t>(
      1, std::min<std::int64_t>({worth, static_cast<std::int64_t>(threads()), count}));
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(parts - 1));
  const auto run = [&](std::int64_t part) {
    body(count * part / parts, count * (part + 1) / parts);
  };
  for (std::int64_t part = 1; part < parts; ++part) {
    try {
      others.emplace_back(run, part);
    } catch (const std::system_error&) {  // no thread to be had
      run(part);
    }
  }
  run(0);
  for (std::thread& other : others) other.join();
}

// Calls f with a null pointer of the type that a code stands for.
template <typename F>
int dispatch(int dtype, const F& f) {
  if (dtype == kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == kBfloat16) return f(static_cast<bfloat16*>(nullptr));
  if (dtype == kFloat16) return f(static_cast<float16*>(nullptr));
  return 1;  // cudaErrorInvalidValue
}

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace lowrank
