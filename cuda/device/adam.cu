// Adam in a subspace, on lists of tensors.
#include "../core/api.h"
#include "../core/weight.h"
#include "tensors.h"

namespace lowrank {
namespace {

// N entries of one lane: loads, advances and stores the moments, stores the delta.
template <int N, typename G, typename S, typename D>
__device__ __forceinline__ void advance(const G* grad, S* exp_avg, S* exp_avg_sq, D* delta,
                                        std::int64_t count, const AdamStep& step, float (&g)[N],
                                        float (&d)[N]) {
  float m[N], v[N];
  load_floats(grad, count, g);
  load_floats(exp_avg, count, m);
  load_floats(exp_avg_sq, count, v);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    d[i] = adam_entry(g[i], m[i], v[i], step);
    if (i >= count) d[i] = 0.0f;
  }
  store_floats(exp_avg, count, m);
  store_floats(exp_avg_sq, count, v);
  store_floats(delta, count, d);
}

constexpr std::int64_t kFlatEntries = kThreads * kVector * 4;  // of a block

template <typename G, typename S, typename D, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    flat_kernel(const Tensors<kMost> __grid_constant__ tensors, AdamStep step,
                const float* device_sizes) {
  const Place place = place_of(tensors, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  step = with_sizes(step, device_sizes, t);
  const std::int64_t numel = tensors.rows[t] * tensors.columns[t];
  const std::int64_t start = place.block * kFlatEntries;
  const std::int64_t stop = start + kFlatEntries < numel ? start + kFlatEntries : numel;
  for (std::int64_t at = start + threadIdx.x * kVector; at < stop; at += kThreads * kVector) {
    float g[kVector], d[kVector];
    advance(static_cast<const G*>(tensors.grads[t]) + at, static_cast<S*>(tensors.exp_avgs[t]) + at,
            static_cast<S*>(tensors.exp_avg_sqs[t]) + at, static_cast<D*>(tensors.deltas[t]) + at,
            stop - at, step, g, d);
  }
}

// Lanes that sum squares, too, or have weights take fewer entries at once: with eight there are not
// enough registers for half of a multiprocessor's threads.
constexpr int kNormVector = 4;

// Weights in place of deltas, which are never stored.
template <typename W, typename S, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    weights_kernel(const Tensors<kMost> __grid_constant__ tensors, AdamStep step, WriteBack write,
                   const float* device_sizes) {
  constexpr int N = kNormVector;
  const Place place = place_of(tensors, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  if (device_sizes != nullptr) {
    step.eps = device_sizes[4 * t];
    step.size = device_sizes[4 * t + 1];
    write = {device_sizes[4 * t + 2], device_sizes[4 * t + 3]};
  }
  const bool counts = device_sizes == nullptr || step.size != 0.0f;
  const std::int64_t numel = tensors.rows[t];
  const std::int64_t start = place.block * kFlatEntries;
  const std::int64_t stop = start + kFlatEntries < numel ? start + kFlatEntries : numel;
  for (std::int64_t at = start + threadIdx.x * N; at < stop; at += kThreads * N) {
    W* const weight = static_cast<W*>(tensors.deltas[t]) + at;
    S* const exp_avg = static_cast<S*>(tensors.exp_avgs[t]) + at;
    S* const exp_avg_sq = static_cast<S*>(tensors.exp_avg_sqs[t]) + at;
    float g[N], m[N], v[N], w[N];
    load_floats(static_cast<const W*>(tensors.grads[t]) + at, stop - at, g);
    load_floats(exp_avg, stop - at, m);
    load_floats(exp_avg_sq, stop - at, v);
    load_floats(weight, stop - at, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float grad = counts ? g[i] : 0.0f;
      w[i] = written(w[i], adam_entry(grad, m[i], v[i], step), 0.0f, write);
    }
    store_floats(exp_avg, stop - at, m);
    store_floats(exp_avg_sq, stop - at, v);
    store_floats(weight, stop - at, w);
  }
}

// Norms of rows: a warp takes a row.
template <typename G, typename S, typename D, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(const Tensors<kMost> __grid_constant__ tensors, AdamStep step,
                const float* device_sizes) {
  const Place place = place_of(tensors, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  step = with_sizes(step, device_sizes, t);
  const std::int64_t row = place.block * kWarps + threadIdx.x / kLanes;
  if (row >= tensors.rows[t]) return;
  const std::int64_t columns = tensors.columns[t];
  float g_squares = 0.0f, d_squares = 0.0f;
  for (std::int64_t j = lane_index() * kNormVector; j < columns; j += kLanes * kNormVector) {
    const std::int64_t at = row * columns + j;
    float g[kNormVector], d[kNormVector];
    advance(static_cast<const G*>(tensors.grads[t]) + at, static_cast<S*>(tensors.exp_avgs[t]) + at,
            static_cast<S*>(tensors.exp_avg_sqs[t]) + at, static_cast<D*>(tensors.deltas[t]) + at,
            columns - j, step, g, d);
#pragma unroll
    for (int i = 0; i < kNormVector; ++i) {
      g_squares += g[i] * g[i];
      d_squares += d[i] * d[i];
    }
  }
  g_squares = warp_sum(g_squares);
  d_squares = warp_sum(d_squares);
  if (lane_index() == 0) {
    tensors.first_side[t][row] = sqrtf(g_squares);
    tensors.second_side[t][row] = sqrtf(d_squares);
  }
}

// Norms of columns: a block takes 64 columns, of which each lane has four in every 16th row.
constexpr int kTileColumns = 64;
constexpr int kTileLanes = kTileColumns / kNormVector;
constexpr int kTileRows = kThreads / kTileLanes;

template <typename G, typename S, typename D, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    columns_kernel(const Tensors<kMost> __grid_constant__ tensors, AdamStep step,
                   const float* device_sizes) {
  __shared__ float sums[kTileRows][kTileColumns];
  const Place place = place_of(tensors, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  step = with_sizes(step, device_sizes, t);
  const std::int64_t rows = tensors.rows[t], columns = tensors.columns[t];
  const int tile_row = static_cast<int>(threadIdx.x) / kTileLanes;
  const int tile_column = static_cast<int>(threadIdx.x) % kTileLanes * kNormVector;
  const std::int64_t column = place.block * kTileColumns + tile_column;
  float squares[2][kNormVector] = {};
  if (column < columns) {
    const std::int64_t end = rows * columns;
    for (std::int64_t at = tile_row * columns + column; at < end; at += kTileRows * columns) {
      float g[kNormVector], d[kNormVector];
      advance(static_cast<const G*>(tensors.grads[t]) + at,
              static_cast<S*>(tensors.exp_avgs[t]) + at,
              static_cast<S*>(tensors.exp_avg_sqs[t]) + at, static_cast<D*>(tensors.deltas[t]) + at,
              columns - column, step, g, d);
#pragma unroll
      for (int k = 0; k < kNormVector; ++k) {
        squares[0][k] += g[k] * g[k];
        squares[1][k] += d[k] * d[k];
      }
    }
  }
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int k = 0; k < kNormVector; ++k) sums[tile_row][tile_column + k] = squares[side][k];
    __syncthreads();
    const std::int64_t own = place.block * kTileColumns + threadIdx.x;
    if (threadIdx.x < kTileColumns && own < columns) {
      float total = 0.0f;
      for (int i = 0; i < kTileRows; ++i) total += sums[i][threadIdx.x];
      (side == 0 ? tensors.first_side : tensors.second_side)[t][own] = sqrtf(total);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_adam(int count, const void* const* grads, void* const* exp_avgs,
                 void* const* exp_avg_sqs, void* const* deltas, float* const* grad_norms,
                 float* const* delta_norms, const std::int64_t* rows, const std::int64_t* columns,
                 int axis, int grad_dtype, int state_dtype, int delta_dtype, double beta1,
                 double beta2, float eps, float size, const float* device_sizes, void* stream) {
  const AdamStep step = make_step(beta1, beta2, eps, size);
  const auto fill = [&](auto& tensors, int i, int t) {
    tensors.grads[i] = grads[t];
    tensors.exp_avgs[i] = exp_avgs[t];
    tensors.exp_avg_sqs[i] = exp_avg_sqs[t];
    tensors.deltas[i] = deltas[t];
    tensors.rows[i] = rows[t];
    tensors.columns[i] = columns[t];
    if (axis < 0) return ceil_divide(rows[t] * columns[t], kFlatEntries);
    tensors.first_side[i] = grad_norms[t];
    tensors.second_side[i] = delta_norms[t];
    return axis == 0 ? ceil_divide(columns[t], kTileColumns) : ceil_divide(rows[t], kWarps);
  };
  return dispatch_adam(
      grad_dtype, state_dtype, delta_dtype, [&]<typename G, typename S, typename D>(G*, S*, D*) {
        const auto start = [&]<int kMost>(const Tensors<kMost>& tensors, int blocks, int begin) {
          const auto kernel = axis < 0    ? flat_kernel<G, S, D, kMost>
                              : axis == 0 ? columns_kernel<G, S, D, kMost>
                                          : rows_kernel<G, S, D, kMost>;
          return launch(kernel, blocks, kThreads, stream, tensors, step,
                        sizes_from(device_sizes, begin));
        };
        return in_batches<Tensors>(count, fill, start);
      });
}

int lowrank_adam_weights(int count, void* const* weights, const void* const* grads,
                         void* const* exp_avgs, void* const* exp_avg_sqs,
                         const std::int64_t* numels, int dtype, int state_dtype, double beta1,
                         double beta2, float eps, float size, float keep, float alpha,
                         const float* device_sizes, void* stream) {
  const AdamStep step = make_step(beta1, beta2, eps, size);
  const auto fill = [&](auto& tensors, int i, int t) {
    tensors.grads[i] = grads[t];
    tensors.exp_avgs[i] = exp_avgs[t];
    tensors.exp_avg_sqs[i] = exp_avg_sqs[t];
    tensors.deltas[i] = weights[t];
    tensors.rows[i] = numels[t];
    return ceil_divide(numels[t], kFlatEntries);
  };
  return dispatch_weights(dtype, state_dtype, [&]<typename W, typename S>(W*, S*) {
    const auto start = [&]<int kMost>(const Tensors<kMost>& tensors, int blocks, int begin) {
      const float* sizes = device_sizes == nullptr ? nullptr : device_sizes + 4 * begin;
      return launch(weights_kernel<W, S, kMost>, blocks, kThreads, stream, tensors, step,
                    WriteBack{keep, alpha}, sizes);
    };
    return in_batches<Tensors>(count, fill, start);
  });
}
