// Adam in a subspace, on lists of tensors.
#include "../core/adam.h"
#include "../core/api.h"
#include "../core/blockwise.h"
#include "warp.h"

namespace lowrank {
namespace {

constexpr int kMost = 24;  // tensors of one launch, whose description is a kernel parameter

// Tensors and the blocks that work on them: those of tensor t are [first[t], first[t + 1]).
struct Tensors {
  const void* grads[kMost];
  void* exp_avgs[kMost];
  void* exp_avg_sqs[kMost];
  void* deltas[kMost];
  float* first_side[kMost];   // norms of gradients, or scales of first moments
  float* second_side[kMost];  // norms of deltas, or scales of second moments
  std::int64_t rows[kMost];
  std::int64_t columns[kMost];
  int first[kMost + 1];
  int count;
};

struct Place {
  int tensor;
  std::int64_t block;  // within the tensor
};

__device__ __forceinline__ Place place_of(const Tensors& tensors) {
  const int block = static_cast<int>(blockIdx.x);
  int t = 0;
  while (t + 1 < tensors.count && tensors.first[t + 1] <= block) ++t;
  return {t, block - tensors.first[t]};
}

__device__ __forceinline__ AdamStep with_sizes(AdamStep step, const float* device_sizes, int t) {
  if (device_sizes != nullptr) {
    step.eps = device_sizes[2 * t];
    step.size = device_sizes[2 * t + 1];
  }
  return step;
}

// Eight entries of one lane: loads, advances and stores the moments, stores the delta.
template <typename G, typename S, typename D>
__device__ __forceinline__ void advance(const G* grad, S* exp_avg, S* exp_avg_sq, D* delta,
                                        std::int64_t count, const AdamStep& step,
                                        float (&g)[kVector], float (&d)[kVector]) {
  float m[kVector], v[kVector];
  load_floats(grad, count, g);
  load_floats(exp_avg, count, m);
  load_floats(exp_avg_sq, count, v);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    d[i] = adam_entry(g[i], m[i], v[i], step);
    if (i >= count) d[i] = 0.0f;
  }
  store_floats(exp_avg, count, m);
  store_floats(exp_avg_sq, count, v);
  store_floats(delta, count, d);
}

constexpr std::int64_t kFlatEntries = kThreads * kVector * 4;  // of a block

template <typename G, typename S, typename D>
__global__ void __launch_bounds__(kThreads, 2)
    flat_kernel(const Tensors tensors, AdamStep step, const float* device_sizes) {
  const Place place = place_of(tensors);
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

// Norms of rows: a warp takes a row.
template <typename G, typename S, typename D>
__global__ void __launch_bounds__(kThreads, 2)
    rows_kernel(const Tensors tensors, AdamStep step, const float* device_sizes) {
  const Place place = place_of(tensors);
  const int t = place.tensor;
  step = with_sizes(step, device_sizes, t);
  const std::int64_t row = place.block * kWarps + threadIdx.x / kLanes;
  if (row >= tensors.rows[t]) return;
  const std::int64_t columns = tensors.columns[t];
  float g_squares = 0.0f, d_squares = 0.0f;
  for (std::int64_t j = lane_index() * kVector; j < columns; j += kWarpSpan) {
    const std::int64_t at = row * columns + j;
    float g[kVector], d[kVector];
    advance(static_cast<const G*>(tensors.grads[t]) + at, static_cast<S*>(tensors.exp_avgs[t]) + at,
            static_cast<S*>(tensors.exp_avg_sqs[t]) + at, static_cast<D*>(tensors.deltas[t]) + at,
            columns - j, step, g, d);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
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

// Norms of columns: a block takes 64 columns, of which each lane has eight in every 32nd row.
constexpr int kTileColumns = 64;
constexpr int kTileLanes = kTileColumns / kVector;
constexpr int kTileRows = kThreads / kTileLanes;

template <typename G, typename S, typename D>
__global__ void __launch_bounds__(kThreads, 2)
    columns_kernel(const Tensors tensors, AdamStep step, const float* device_sizes) {
  __shared__ float sums[kTileRows][kTileColumns];
  const Place place = place_of(tensors);
  const int t = place.tensor;
  step = with_sizes(step, device_sizes, t);
  const std::int64_t rows = tensors.rows[t], columns = tensors.columns[t];
  const int tile_row = static_cast<int>(threadIdx.x) / kTileLanes;
  const int tile_column = static_cast<int>(threadIdx.x) % kTileLanes * kVector;
  const std::int64_t column = place.block * kTileColumns + tile_column;
  float squares[2][kVector] = {};
  if (column < columns) {
    for (std::int64_t i = tile_row; i < rows; i += kTileRows) {
      const std::int64_t at = i * columns + column;
      float g[kVector], d[kVector];
      advance(static_cast<const G*>(tensors.grads[t]) + at,
              static_cast<S*>(tensors.exp_avgs[t]) + at,
              static_cast<S*>(tensors.exp_avg_sqs[t]) + at, static_cast<D*>(tensors.deltas[t]) + at,
              columns - column, step, g, d);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        squares[0][k] += g[k] * g[k];
        squares[1][k] += d[k] * d[k];
      }
    }
  }
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) sums[tile_row][tile_column + k] = squares[side][k];
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

constexpr int kBlock8bit = kWarpSpan;  // entries that share a scale: 256
constexpr int kSignedZero = 127;

// Quantises a warp's 256 entries.
__device__ __forceinline__ void requantize(const float (&values)[kVector], std::uint8_t* codes,
                                           float* absmax, std::int64_t count,
                                           const std::int32_t* table, int zero) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) largest = max_or_nan(fabsf(values[i]), largest);
  }
  largest = warp_max(largest);
  if (lane_index() == 0) *absmax = largest;
  const float divisor = block_divisor(largest);
  Vector<std::uint8_t> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    result.entry[i] = dynamic_code(values[i] / divisor, table, zero);
  }
  store_vector(codes, result, count);
}

constexpr int kBlocksAWarp = 4;

template <typename G, typename D>
__global__ void __launch_bounds__(kThreads, 2)
    kernel_8bit(const Tensors tensors, AdamStep step, const float* device_sizes,
                const std::int32_t* tables, const float* maps) {
  __shared__ std::int32_t shared_tables[2 * kEntries];
  __shared__ float shared_maps[2 * 256];
  stage(shared_tables, tables, 2 * kEntries);
  stage(shared_maps, maps, 2 * 256);
  __syncthreads();
  const Place place = place_of(tensors);
  const int t = place.tensor;
  step = with_sizes(step, device_sizes, t);
  const std::int64_t numel = tensors.rows[t];
  for (int turn = 0; turn < kBlocksAWarp; ++turn) {
    const std::int64_t b = (place.block * kBlocksAWarp + turn) * kWarps + threadIdx.x / kLanes;
    if (b * kBlock8bit >= numel) return;
    const std::int64_t at = b * kBlock8bit + lane_index() * kVector;
    const std::int64_t count = numel - at;  // may be negative: this lane has no entries
    auto* m_codes = static_cast<std::uint8_t*>(tensors.exp_avgs[t]) + at;
    auto* v_codes = static_cast<std::uint8_t*>(tensors.exp_avg_sqs[t]) + at;
    const float m_scale = tensors.first_side[t][b], v_scale = tensors.second_side[t][b];
    const Vector<std::uint8_t> m_loaded = load_vector<std::uint8_t>(m_codes, count);
    const Vector<std::uint8_t> v_loaded = load_vector<std::uint8_t>(v_codes, count);
    float g[kVector], m[kVector], v[kVector], d[kVector];
    load_floats(static_cast<const G*>(tensors.grads[t]) + at, count, g);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      m[i] = shared_maps[m_loaded.entry[i]] * m_scale;
      v[i] = shared_maps[256 + v_loaded.entry[i]] * v_scale;
      d[i] = adam_entry(g[i], m[i], v[i], step);
    }
    store_floats(static_cast<D*>(tensors.deltas[t]) + at, count, d);
    __syncwarp();  // all lanes have read the scales
    requantize(m, m_codes, tensors.first_side[t] + b, count, shared_tables, kSignedZero);
    requantize(v, v_codes, tensors.second_side[t] + b, count, shared_tables + kEntries, 0);
  }
}

AdamStep make_step(double beta1, double beta2, float eps, float size) {
  return {static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2), eps, size};
}

const float* sizes_from(const float* device_sizes, int begin) {
  return device_sizes == nullptr ? nullptr : device_sizes + 2 * begin;
}

// Launches once for every `kMost` tensors; fill(tensors, slot, t) describes tensor t and returns
// how many blocks it needs.
template <typename Fill, typename Launch>
int in_batches(int count, const Fill& fill, const Launch& start) {
  for (int begin = 0; begin < count; begin += kMost) {
    Tensors tensors{};
    tensors.count = count - begin < kMost ? count - begin : kMost;
    for (int i = 0; i < tensors.count; ++i) {
      tensors.first[i + 1] = tensors.first[i] + static_cast<int>(fill(tensors, i, begin + i));
    }
    const int error = start(tensors, tensors.first[tensors.count], begin);
    if (error != 0) return error;
  }
  return 0;
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
  const auto fill = [&](Tensors& tensors, int i, int t) {
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
        const auto kernel = axis < 0    ? flat_kernel<G, S, D>
                            : axis == 0 ? columns_kernel<G, S, D>
                                        : rows_kernel<G, S, D>;
        return in_batches(count, fill, [&](const Tensors& tensors, int blocks, int begin) {
          return launch(kernel, blocks, kThreads, stream, tensors, step,
                        sizes_from(device_sizes, begin));
        });
      });
}

int lowrank_adam_8bit(int count, const void* const* grads, void* const* exp_avgs,
                      float* const* exp_avg_absmax, void* const* exp_avg_sqs,
                      float* const* exp_avg_sq_absmax, void* const* deltas,
                      const std::int64_t* numels, int grad_dtype, int delta_dtype, double beta1,
                      double beta2, float eps, float size, const float* device_sizes,
                      const std::int32_t* tables, const float* maps, void* stream) {
  const AdamStep step = make_step(beta1, beta2, eps, size);
  const auto fill = [&](Tensors& tensors, int i, int t) {
    tensors.grads[i] = grads[t];
    tensors.exp_avgs[i] = exp_avgs[t];
    tensors.exp_avg_sqs[i] = exp_avg_sqs[t];
    tensors.deltas[i] = deltas[t];
    tensors.first_side[i] = exp_avg_absmax[t];
    tensors.second_side[i] = exp_avg_sq_absmax[t];
    tensors.rows[i] = numels[t];
    return ceil_divide(numels[t], kBlock8bit * kWarps * kBlocksAWarp);
  };
  return dispatch_deltas(grad_dtype, delta_dtype, [&]<typename G, typename D>(G*, D*) {
    return in_batches(count, fill, [&](const Tensors& tensors, int blocks, int begin) {
      return launch(kernel_8bit<G, D>, blocks, kThreads, stream, tensors, step,
                    sizes_from(device_sizes, begin), tables, maps);
    });
  });
}
