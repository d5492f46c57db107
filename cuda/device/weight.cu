// Writing an update into a weight, one pass over it: dense, or in eight bits.
#include "../core/api.h"
#include "../core/weight.h"
#include "warp.h"

namespace lowrank {
namespace {

// What is taken off each entry, besides decay; see core/api.h.
struct Update {
  const void* delta;
  const void* grad;
  const float* factors;
  std::int64_t row_stride;
  std::int64_t column_stride;
  std::int64_t columns;
  int delta_dtype;
  int grad_dtype;
  WriteBack write;
};

// Eight consecutive entries from flat position `at` on.
__device__ __forceinline__ void apply(const Update& update, std::int64_t at, std::int64_t count,
                                      float (&values)[kVector]) {
  float steps[kVector] = {}, residuals[kVector] = {};
  if (update.delta != nullptr) load_floats(update.delta, update.delta_dtype, at, count, steps);
  if (update.grad != nullptr) {
    load_floats(update.grad, update.grad_dtype, at, count, residuals);
    std::int64_t row = at / update.columns, column = at - row * update.columns;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) {
        residuals[i] *= update.factors[row * update.row_stride + column * update.column_stride];
      }
      if (++column == update.columns) {
        column = 0;
        ++row;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = written(values[i], steps[i], residuals[i], update.write);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dense_kernel(T* weight, const Update update, std::int64_t numel) {
  const std::int64_t spans = ceil_divide(numel, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector;
    if (at >= numel) continue;
    float values[kVector];
    load_floats(weight + at, numel - at, values);
    apply(update, at, numel - at, values);
    store_floats(weight + at, numel - at, values);
  }
}

__global__ void __launch_bounds__(kThreads)
    stochastic_kernel(bfloat16* weight, const Update update, std::int64_t numel, std::uint64_t seed,
                      std::uint64_t first) {
  const std::int64_t spans = ceil_divide(numel, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector;
    if (at >= numel) continue;
    float values[kVector];
    load_floats(weight + at, numel - at, values);
    apply(update, at, numel - at, values);
    Vector<bfloat16> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      result.entry[i] =
          stochastic_bfloat16(values[i], seed, first + static_cast<std::uint64_t>(at + i));
    }
    store_vector(weight + at, result, numel - at);
  }
}

// Eight entries of an INT8 weight before and after the update.
__device__ __forceinline__ bool updated(const std::uint8_t* codes, GroupParameters group,
                                        const Update& update, std::int64_t at, std::int64_t stop,
                                        float (&values)[kVector]) {
  const Vector<std::uint8_t> loaded = load_vector(codes + at, stop - at);
  float before[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    before[i] = values[i] = value_of(loaded.entry[i], group, kAffine, nullptr);
  }
  apply(update, at, stop - at, values);
  bool changed = false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (at + i >= stop) values[i] = 0.0f;
    changed = changed || (at + i < stop && values[i] != before[i]);
  }
  return changed;
}

__device__ __forceinline__ void widen(const float (&values)[kVector], float& low, float& high) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    low = min_or_nan(low, values[i]);
    high = max_or_nan(high, values[i]);
  }
}

// A warp takes a group; groups of more than 256 entries are computed twice.
__global__ void __launch_bounds__(kThreads)
    int8_kernel(std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                const Update update, std::int64_t numel, std::int64_t group, std::uint64_t seed,
                std::uint64_t first) {
  const std::int64_t groups = ceil_divide(numel, group);
  for (std::int64_t g = warp_index(); g < groups; g += warp_count()) {
    const std::int64_t stop = (g + 1) * group < numel ? (g + 1) * group : numel;
    const std::int64_t mine = g * group + lane_index() * kVector;
    const GroupParameters old{load(scales, scale_dtype, g), load(zeros, scale_dtype, g)};
    float kept[kVector], low = 0.0f, high = 0.0f;
    bool changed = updated(codes, old, update, mine, stop, kept);
    widen(kept, low, high);
    for (std::int64_t at = mine + kWarpSpan; at < stop; at += kWarpSpan) {
      float others[kVector];
      changed = updated(codes, old, update, at, stop, others) || changed;
      widen(others, low, high);
    }
    if (!__any_sync(0xFFFFFFFFu, changed)) continue;
    const GroupParameters own = group_parameters(warp_min(low), warp_max(high), kAffine, 255.0f,
                                                 1.0f / 255.0f, scale_dtype);
    if (lane_index() == 0) {
      store(scales, scale_dtype, g, own.scale);
      store(zeros, scale_dtype, g, own.zero);
    }
    for (std::int64_t at = mine; at < stop; at += kWarpSpan) {
      if (at != mine) updated(codes, old, update, at, stop, kept);
      Vector<std::uint8_t> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        result.entry[i] =
            stochastic_code(kept[i], own, 255.0f, seed, first + static_cast<std::uint64_t>(at + i));
      }
      store_vector(codes + at, result, stop - at);
    }
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_write_back(void* weight, int dtype, const void* delta, int delta_dtype,
                       const void* grad, int grad_dtype, const float* factors,
                       std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                       std::int64_t columns, float keep, float alpha, int stochastic,
                       std::uint64_t seed, std::uint64_t first, void* stream) {
  const Update update{delta,   grad,        factors,    row_stride,   column_stride,
                      columns, delta_dtype, grad_dtype, {keep, alpha}};
  const std::int64_t numel = rows * columns;
  const std::int64_t blocks = blocks_for(ceil_divide(numel, kWarpSpan));
  if (stochastic != 0 && dtype == kBfloat16) {
    return launch(stochastic_kernel, blocks, kThreads, stream, static_cast<bfloat16*>(weight),
                  update, numel, seed, first);
  }
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(dense_kernel<T>, blocks, kThreads, stream, static_cast<T*>(weight), update,
                  numel);
  });
}

int lowrank_write_back_int8(std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                            const void* delta, int delta_dtype, const void* grad, int grad_dtype,
                            const float* factors, std::int64_t row_stride,
                            std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                            std::int64_t group, float keep, float alpha, std::uint64_t seed,
                            std::uint64_t first, void* stream) {
  const Update update{delta,   grad,        factors,    row_stride,   column_stride,
                      columns, delta_dtype, grad_dtype, {keep, alpha}};
  const std::int64_t numel = rows * columns;
  return launch(int8_kernel, blocks_for(ceil_divide(numel, group)), kThreads, stream, codes, scales,
                zeros, scale_dtype, update, numel, group, seed, first);
}
