// What the host's library says of itself.
#include <atomic>

#include "../core/api.h"
#include "parallel.h"

namespace {
std::atomic<int> thread_count{1};
}

namespace lowrank {
int threads() { return thread_count.load(std::memory_order_relaxed); }
}  // namespace lowrank

int lowrank_abi() { return LOWRANK_ABI; }

const char* lowrank_error(int code) { return code == 0 ? "no error" : "invalid argument"; }

void lowrank_set_threads(int threads) { thread_count = threads < 1 ? 1 : threads; }

int lowrank_devices(int* count) {
  *count = 0;
  return 0;
}

int lowrank_capability(int, int* capability) {
  *capability = 0;
  return 0;
}

int lowrank_probe() { return 0; }
