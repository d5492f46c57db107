// Adam with block-wise 8-bit moments, on lists of tensors.
#include "../core/api.h"
#include "../core/blockwise.h"
#include "tensors.h"

namespace lowrank {
namespace {

constexpr int kBlock8bit = kWarpSpan;  // entries that share a scale: 256
constexpr int kSignedZero = 127;

// Quantises a warp's 256 entries.
__device__ __forceinline__ void requantize(const float (&values)[kVector], std::uint8_t* codes,
                                           float* absmax, std::int64_t count,
                                           const std::int32_t* table, int zero) {
  std::int32_t pattern = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const auto own = static_cast<std::int32_t>(bits_of(values[i]) & 0x7FFFFFFFu);
    if (i < count && own > pattern) pattern = own;
  }
  const float largest = float_of(static_cast<std::uint32_t>(lanes_max(pattern)));
  if (lane_index() == 0) *absmax = largest;
  const float factor = reciprocal(largest);
  Vector<std::uint8_t> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    result.entry[i] = dynamic_code(values[i] * factor, table, zero);
  }
  store_vector(codes, result, count);
}

constexpr int kBlocksAWarp = 4;
constexpr std::int64_t kEntries8bit = kBlock8bit * kWarps * kBlocksAWarp;  // of a piece of work
constexpr int kResident8bit = 5;  // blocks whose tables fit on a multiprocessor of 164 KB

// Few blocks that stay, and take pieces of work in turn: each stages 28 KB of tables once.
template <typename G, typename D, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    adam_8bit_kernel(const Tensors<kMost> __grid_constant__ tensors, AdamStep step,
                     const float* device_sizes, const std::int32_t* tables, const float* maps) {
  __shared__ std::int32_t shared_tables[2 * kEntries];
  __shared__ float shared_maps[2 * 256];
  stage(shared_tables, tables, 2 * kEntries);
  stage(shared_maps, maps, 2 * 256);
  __syncthreads();
  const int pieces = tensors.first[tensors.count];
  for (int piece = static_cast<int>(blockIdx.x); piece < pieces;
       piece += static_cast<int>(gridDim.x)) {
    const Place place = place_of(tensors, piece);
    const int t = place.tensor;
    const AdamStep own = with_sizes(step, device_sizes, t);
    const std::int64_t numel = tensors.rows[t];
    for (int turn = 0; turn < kBlocksAWarp; ++turn) {
      const std::int64_t b = (place.block * kBlocksAWarp + turn) * kWarps + threadIdx.x / kLanes;
      if (b * kBlock8bit >= numel) break;
      const std::int64_t at = b * kBlock8bit + lane_index() * kVector;
      const std::int64_t count = numel - at;  // may be negative: this lane has no entries
      auto* m_codes = static_cast<std::uint8_t*>(tensors.exp_avgs[t]) + at;
      auto* v_codes = static_cast<std::uint8_t*>(tensors.exp_avg_sqs[t]) + at;
      const float m_scale = tensors.first_side[t][b], v_scale = tensors.second_side[t][b];
      const Vector<std::uint8_t> m_loaded = load_vector(m_codes, count);
      const Vector<std::uint8_t> v_loaded = load_vector(v_codes, count);
      float g[kVector], m[kVector], v[kVector], d[kVector];
      load_floats(static_cast<const G*>(tensors.grads[t]) + at, count, g);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        m[i] = shared_maps[m_loaded.entry[i]] * m_scale;
        v[i] = shared_maps[256 + v_loaded.entry[i]] * v_scale;
        d[i] = adam_entry(g[i], m[i], v[i], own);
      }
      store_floats(static_cast<D*>(tensors.deltas[t]) + at, count, d);
      __syncwarp();  // all lanes have read the scales
      requantize(m, m_codes, tensors.first_side[t] + b, count, shared_tables, kSignedZero);
      requantize(v, v_codes, tensors.second_side[t] + b, count, shared_tables + kEntries, 0);
    }
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_adam_8bit(int count, const void* const* grads, void* const* exp_avgs,
                      float* const* exp_avg_absmax, void* const* exp_avg_sqs,
                      float* const* exp_avg_sq_absmax, void* const* deltas,
                      const std::int64_t* numels, int grad_dtype, int delta_dtype, double beta1,
                      double beta2, float eps, float size, const float* device_sizes,
                      const std::int32_t* tables, const float* maps, void* stream) {
  const AdamStep step = make_step(beta1, beta2, eps, size);
  const auto fill = [&](auto& tensors, int i, int t) {
    tensors.grads[i] = grads[t];
    tensors.exp_avgs[i] = exp_avgs[t];
    tensors.exp_avg_sqs[i] = exp_avg_sqs[t];
    tensors.deltas[i] = deltas[t];
    tensors.first_side[i] = exp_avg_absmax[t];
    tensors.second_side[i] = exp_avg_sq_absmax[t];
    tensors.rows[i] = numels[t];
    return ceil_divide(numels[t], kEntries8bit);
  };
  return dispatch_deltas(grad_dtype, delta_dtype, [&]<typename G, typename D>(G*, D*) {
    const auto start = [&]<int kMost>(const Tensors<kMost>& tensors, int pieces, int begin) {
      const std::int64_t blocks = blocks_for(std::int64_t{pieces} * kWarps, kResident8bit);
      return launch(adam_8bit_kernel<G, D, kMost>, blocks, kThreads, stream, tensors, step,
                    sizes_from(device_sizes, begin), tables, maps);
    };
    return in_batches<Tensors>(count, fill, start);
  });
}
