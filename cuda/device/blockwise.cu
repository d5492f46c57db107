// Block-wise 8-bit quantisation: a warp takes a block.
#include "../core/api.h"
#include "../core/blockwise.h"
#include "warp.h"

namespace lowrank {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_blocks_kernel(const T* x, std::uint8_t* codes, float* absmax, std::int64_t numel,
                           std::int64_t block, const std::int32_t* table, int zero) {
  __shared__ std::int32_t shared_table[kEntries];
  stage(shared_table, table, kEntries);
  __syncthreads();
  const std::int64_t blocks = ceil_divide(numel, block);
  for (std::int64_t b = warp_index(); b < blocks; b += warp_count()) {
    const std::int64_t stop = (b + 1) * block < numel ? (b + 1) * block : numel;
    const std::int64_t mine = b * block + lane_index() * kVector;
    float kept[kVector];  // the block's first 256 entries stay in registers
    load_floats(x + mine, stop - mine, kept);
    std::int32_t pattern = magnitude(0, kept);
    for (std::int64_t at = mine + kWarpSpan; at < stop; at += kWarpSpan) {
      float others[kVector];
      load_floats(x + at, stop - at, others);
      pattern = magnitude(pattern, others);
    }
    const float largest = float_of(static_cast<std::uint32_t>(lanes_max(pattern)));
    if (lane_index() == 0) absmax[b] = largest;
    const float factor = reciprocal(largest);
    for (std::int64_t at = mine; at < stop; at += kWarpSpan) {
      if (at != mine) load_floats(x + at, stop - at, kept);
      Vector<std::uint8_t> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        result.entry[i] = dynamic_code(kept[i] * factor, shared_table, zero);
      }
      store_vector(codes + at, result, stop - at);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_blocks_kernel(const std::uint8_t* codes, const float* absmax, T* out,
                             std::int64_t numel, std::int64_t block, const float* map) {
  __shared__ float shared_map[256];
  stage(shared_map, map, 256);
  __syncthreads();
  const std::int64_t blocks = ceil_divide(numel, block);
  for (std::int64_t b = warp_index(); b < blocks; b += warp_count()) {
    const std::int64_t stop = (b + 1) * block < numel ? (b + 1) * block : numel;
    const float scale = absmax[b];
    for (std::int64_t at = b * block + lane_index() * kVector; at < stop; at += kWarpSpan) {
      const Vector<std::uint8_t> loaded = load_vector(codes + at, stop - at);
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = shared_map[loaded.entry[i]] * scale;
      store_floats(out + at, stop - at, values);
    }
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_quantize_blockwise(const void* x, int dtype, std::uint8_t* codes, float* absmax,
                               std::int64_t numel, std::int64_t block, const std::int32_t* table,
                               int zero, void* stream) {
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(quantize_blocks_kernel<T>, blocks_for(ceil_divide(numel, block)), kThreads,
                  stream, static_cast<const T*>(x), codes, absmax, numel, block, table, zero);
  });
}

int lowrank_dequantize_blockwise(const std::uint8_t* codes, const float* absmax, void* out,
                                 int dtype, std::int64_t numel, std::int64_t block,
                                 const float* map, void* stream) {
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(dequantize_blocks_kernel<T>, blocks_for(ceil_divide(numel, block)), kThreads,
                  stream, codes, absmax, static_cast<T*>(out), numel, block, map);
  });
}
