// Lists of tensors in one launch, for Adam.
#pragma once

#include "../core/adam.h"
#include "lists.h"

namespace lowrank {

template <int kMost>
struct Tensors : Blocks<kMost> {
  const void* grads[kMost];
  void* exp_avgs[kMost];
  void* exp_avg_sqs[kMost];
  void* deltas[kMost];        // or weights
  float* first_side[kMost];   // norms of gradients, or scales of first moments
  float* second_side[kMost];  // norms of deltas, or scales of second moments
  std::int64_t rows[kMost];
  std::int64_t columns[kMost];
};

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

}  // namespace lowrank
