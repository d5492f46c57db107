// Lists of tensors in one launch.
#pragma once

#include "warp.h"

namespace lowrank {

// Tensors of one launch, whose description is a kernel parameter: a few, or as many as fit. CUDA
// has taken 32,764 bytes of parameters since 12.1, 4,096 before.
constexpr int kFew = 16;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kMany = 56;
#else
constexpr int kMany = 472;
#endif

// A description must leave room for a kernel's other parameters.
template <typename T>
constexpr bool fits = sizeof(T) <= (kMany > 56 ? 32764 : 4096) - 128;

// The blocks that work on the tensors of a launch: those of tensor t are [first[t], first[t + 1]).
// What else is known of them is added by the kernels that take lists.
template <int kMost>
struct Blocks {
  int first[kMost + 1];
  int count;
};

struct Place {
  int tensor;
  std::int64_t block;  // within the tensor
};

// By bisection; the same in all threads of a block.
template <int kMost>
__device__ __forceinline__ Place place_of(const Blocks<kMost>& blocks, int block) {
  int t = 0;
  for (int beyond = blocks.count; beyond - t > 1;) {
    const int middle = (t + beyond) / 2;
    (blocks.first[middle] <= block ? t : beyond) = middle;
  }
  return {t, block - blocks.first[t]};
}

// Launches once for every kMost tensors; fill(list, slot, t) describes tensor t and returns how
// many blocks it needs, start(list, blocks, begin) launches.
template <template <int> class List, int kMost, typename Fill, typename Launch>
int in_batches_of(int count, const Fill& fill, const Launch& start) {
  for (int begin = 0; begin < count; begin += kMost) {
    List<kMost> list;
    list.count = count - begin < kMost ? count - begin : kMost;
    list.first[0] = 0;
    for (int i = 0; i < list.count; ++i) {
      list.first[i + 1] = list.first[i] + static_cast<int>(fill(list, i, begin + i));
    }
    const int error = start(list, list.first[list.count], begin);
    if (error != 0) return error;
  }
  return 0;
}

template <template <int> class List, typename Fill, typename Launch>
int in_batches(int count, const Fill& fill, const Launch& start) {
  static_assert(fits<List<kMany>>);
  return count <= kFew ? in_batches_of<List, kFew>(count, fill, start)
                       : in_batches_of<List, kMany>(count, fill, start);
}

}  // namespace lowrank
