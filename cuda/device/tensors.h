// Lists of tensors in one launch, for Adam.
#pragma once

#include "../core/adam.h"
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

// Tensors and the blocks that work on them: those of tensor t are [first[t], first[t + 1]).
template <int kMost>
struct Tensors {
  const void* grads[kMost];
  void* exp_avgs[kMost];
  void* exp_avg_sqs[kMost];
  void* deltas[kMost];        // or weights
  float* first_side[kMost];   // norms of gradients, or scales of first moments
  float* second_side[kMost];  // norms of deltas, or scales of second moments
  std::int64_t rows[kMost];
  std::int64_t columns[kMost];
  int first[kMost + 1];
  int count;
};
static_assert(sizeof(Tensors<kMany>) <= (kMany > 56 ? 32764 : 4096) - 128);

struct Place {
  int tensor;
  std::int64_t block;  // within the tensor
};

// By bisection; the same in all threads of a block.
template <typename T>
__device__ __forceinline__ Place place_of(const T& tensors, int block) {
  int t = 0;
  for (int beyond = tensors.count; beyond - t > 1;) {
    const int middle = (t + beyond) / 2;
    (tensors.first[middle] <= block ? t : beyond) = middle;
  }
  return {t, block - tensors.first[t]};
}

__device__ __forceinline__ AdamStep with_sizes(AdamStep step, const float* device_sizes, int t) {
  if (device_sizes != nullptr) {
    step.eps = device_sizes[2 * t];
    step.size = device_sizes[2 * t + 1];
  }
  return step;
}

inline AdamStep make_step(double beta1, double beta2, float eps, float size) {
  return {static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2), eps, size};
}

inline const float* sizes_from(const float* device_sizes, int begin) {
  return device_sizes == nullptr ? nullptr : device_sizes + 2 * begin;
}

// Launches once for every kMany tensors; fill(tensors, slot, t) describes tensor t and returns how
// many blocks it needs, start(tensors, blocks, begin) launches.
template <int kMost, typename Fill, typename Launch>
int in_batches_of(int count, const Fill& fill, const Launch& start) {
  for (int begin = 0; begin < count; begin += kMost) {
    Tensors<kMost> tensors;
    tensors.count = count - begin < kMost ? count - begin : kMost;
    tensors.first[0] = 0;
    for (int i = 0; i < tensors.count; ++i) {
      tensors.first[i + 1] = tensors.first[i] + static_cast<int>(fill(tensors, i, begin + i));
    }
    const int error = start(tensors, tensors.first[tensors.count], begin);
    if (error != 0) return error;
  }
  return 0;
}

template <typename Fill, typename Launch>
int in_batches(int count, const Fill& fill, const Launch& start) {
  return count <= kFew ? in_batches_of<kFew>(count, fill, start)
                       : in_batches_of<kMany>(count, fill, start);
}

}  // namespace lowrank
