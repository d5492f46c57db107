// The simulator's CUDA threads as fibers of one thread: each runs until it waits at a barrier. A
// barrier costs a fraction of a microsecond a thread, and one that not all threads reach is found.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {

struct Index {
  unsigned x;
};

inline Index thread_index{}, block_index{}, grid_size{};

constexpr std::size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  unsigned thread;
  char* stack;
  std::size_t size;
  Fiber* next;  // of the ring of those that still run
  Fiber* before;
};

inline std::vector<Fiber> fibers;
inline Fiber outside;  // where the block was started
inline Fiber* running = &outside;
inline const std::function<void()>* body_of_block = nullptr;
inline long idle = 0;  // switches since a fiber last got on

// AddressSanitizer has to know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
inline void leaving(void** kept, const Fiber& other) {
  __sanitizer_start_switch_fiber(kept, other.stack, other.size);
}
inline void entered(void* kept) {
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(kept, &bottom, &size);
  if (kept != nullptr || running != &fibers[0]) return;
  outside.stack = static_cast<char*>(const_cast<void*>(bottom));
  outside.size = size;
}
#else
inline void leaving(void**, const Fiber&) {}
inline void entered(void*) {}
#endif

inline void switch_to(Fiber& other) {
  Fiber& own = *running;
  running = &other;
  thread_index.x = other.thread;
  void* kept = nullptr;
  leaving(&kept, other);
  swapcontext(&own.context, &other.context);
  entered(kept);
}

inline void yield() {
  if (++idle > 8 * static_cast<long>(fibers.size())) {
    std::fprintf(stderr, "simulator: threads wait at a barrier that the others do not reach\n");
    std::abort();
  }
  if (running->next != running) switch_to(*running->next);
}

// Threads that have left a kernel no longer hold the others up, as on a GPU.
class Barrier {
 public:
  void reset(int expected) { expected_ = expected; }

  void wait() {
    idle = 0;
    if (++waiting_ == expected_) return release();
    const long own = generation_;
    while (generation_ == own) yield();
  }

  void leave() {
    idle = 0;
    if (--expected_ == waiting_ && waiting_ > 0) release();
  }

 private:
  void release() {
    waiting_ = 0;
    ++generation_;
  }

  int expected_ = 0, waiting_ = 0;
  long generation_ = 0;
};

inline void entry() {
  entered(nullptr);
  (*body_of_block)();
  Fiber& own = *running;
  own.before->next = own.next;
  own.next->before = own.before;
  running = own.next == &own ? &outside : own.next;
  thread_index.x = running->thread;
  leaving(nullptr, *running);
  setcontext(&running->context);
}

template <typename Body>
void run_block(int threads, const Body& body) {
  const std::function<void()> kept(body);
  body_of_block = &kept;
  const auto count = static_cast<std::size_t>(threads);
  if (fibers.size() != count) {
    for (Fiber& fiber : fibers) munmap(fiber.stack, kStack);
    fibers.assign(count, Fiber{});
    for (Fiber& fiber : fibers) {
      fiber.size = kStack;
      fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = static_cast<unsigned>(i);
    fiber.next = &fibers[(i + 1) % count];
    fiber.before = &fibers[(i + count - 1) % count];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    // AddressSanitizer would take each switch for a new use of this stack, and forget what it knows
    // of the variables on it.
    fiber.context.uc_stack = {};
  }
  idle = 0;
  switch_to(fibers[0]);
}

}  // namespace simulator
