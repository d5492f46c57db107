// Cautious updates with a quantised momentum: a warp for each row.
#include "../core/api.h"
#include "../core/cautious.h"
#include "warp.h"

namespace lowrank {
namespace {

constexpr int kPair = 2;                            // neighbours of a lane, a byte in four bits
constexpr int kTurns = kRowBlock / kPair / kLanes;  // pairs of a lane in a block

template <bool kFour>
__device__ __forceinline__ void read_pair(const std::uint8_t* codes, std::int64_t at,
                                          std::int64_t columns, float scale, float (&m)[kPair]) {
  if constexpr (kFour) {
    const int both = at < columns ? codes[at / kPair] : 0;
    m[0] = static_cast<float>(signed_half(both)) * scale;
    m[1] = static_cast<float>(signed_half(both >> 4)) * scale;
  } else {
#pragma unroll
    for (int h = 0; h < kPair; ++h) {
      const int code = at + h < columns ? codes[at + h] : 0;
      m[h] = static_cast<float>(static_cast<std::int8_t>(code)) * scale;
    }
  }
}

template <bool kFour>
__device__ __forceinline__ void write_pair(const float (&m)[kPair], float inverse,
                                           std::uint64_t seed, std::uint64_t first, std::int64_t at,
                                           std::int64_t columns, std::uint8_t* codes) {
  int fresh[kPair] = {};
#pragma unroll
  for (int h = 0; h < kPair; ++h) {
    const std::uint64_t position = first + static_cast<std::uint64_t>(at + h);
    const float noise = kFour ? uniform(seed, position) : 0.0f;
    if (at + h < columns) fresh[h] = RowCodes<kFour>::code(m[h] * inverse, noise);
  }
  if constexpr (kFour) {
    if (at >= columns) return;
    codes[at / kPair] = static_cast<std::uint8_t>((fresh[0] & 15) | ((fresh[1] & 15) << 4));
  } else {
#pragma unroll
    for (int h = 0; h < kPair; ++h) {
      if (at + h < columns) codes[at + h] = static_cast<std::uint8_t>(fresh[h]);
    }
  }
}

// Writes the directions of a row before the mask; returns how many of the lane's entries agree.
template <bool kFour, typename G>
__device__ __forceinline__ int advance_row(const G* grad, std::uint8_t* codes, float* scales,
                                           float row, const float* by_column, float* direction,
                                           std::int64_t columns, const CautiousStep& step,
                                           std::uint64_t seed, std::uint64_t first) {
  int agreeing = 0;
  for (std::int64_t start = 0; start < columns; start += kRowBlock, ++scales) {
    const float scale = *scales;
    float m[kTurns][kPair];
    std::int32_t pattern = 0;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const std::int64_t at = start + kPair * (turn * kLanes + lane_index());
      read_pair<kFour>(codes, at, columns, scale, m[turn]);
#pragma unroll
      for (int h = 0; h < kPair; ++h) {
        if (at + h >= columns) continue;
        const float g = to_float(grad[at + h]);
        const float d = cautious_entry(g, m[turn][h], row, by_column[at + h], step);
        direction[at + h] = d;
        agreeing += agree(d, g) ? 1 : 0;
        const auto own = static_cast<std::int32_t>(bits_of(m[turn][h]) & 0x7FFFFFFFu);
        pattern = own > pattern ? own : pattern;
      }
    }
    const float largest = float_of(static_cast<std::uint32_t>(lanes_max(pattern)));
    const float fresh = RowCodes<kFour>::scale(largest);
    __syncwarp();  // all lanes have read the scale
    if (lane_index() == 0) *scales = fresh;
    const float inverse = reciprocal(fresh);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const std::int64_t at = start + kPair * (turn * kLanes + lane_index());
      write_pair<kFour>(m[turn], inverse, seed, first, at, columns, codes);
    }
  }
  return agreeing;
}

template <bool kFour, typename G>
__global__ void __launch_bounds__(kThreads, kResident)
    cautious_rows_kernel(const G* grad, std::uint8_t* codes, float* scales, const float* by_row,
                         const float* by_column, float* direction, std::int64_t rows,
                         std::int64_t columns, CautiousStep step, bool cautious, float each,
                         std::uint64_t seed, std::uint64_t first, std::int64_t stride) {
  const std::int64_t bytes = kFour ? ceil_divide(columns, kPair) : columns;
  const std::int64_t blocks = ceil_divide(columns, kRowBlock);
  for (std::int64_t i = warp_index(); i < rows; i += warp_count()) {
    const G* own_grad = grad + i * columns;
    float* own = direction + i * columns;
    const int here = advance_row<kFour>(own_grad, codes + i * bytes, scales + i * blocks, by_row[i],
                                        by_column, own, columns, step, seed,
                                        first + static_cast<std::uint64_t>(i * stride));
    if (!cautious) continue;
    // Rows have fewer than 2^24 entries, which fp32 counts exactly.
    const int agreeing = static_cast<int>(warp_sum(static_cast<float>(here)));
    const float factor = cautious_factor(agreeing, each);
    // Each lane reads again what it has written itself.
    for (std::int64_t start = kPair * lane_index(); start < columns; start += kPair * kLanes) {
#pragma unroll
      for (int h = 0; h < kPair; ++h) {
        if (start + h >= columns) continue;
        const float d = own[start + h];
        own[start + h] = d * (agree(d, to_float(own_grad[start + h])) ? factor : 0.0f);
      }
    }
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_cautious_rows(const void* grad, int dtype, std::uint8_t* codes, float* scales,
                          const float* by_row, const float* by_column, float* direction,
                          std::int64_t rows, std::int64_t columns, int bits, int cautious,
                          float share, float eps, float correction, float each, std::uint64_t seed,
                          std::uint64_t first, std::int64_t stride, void* stream) {
  return dispatch(dtype, [&]<typename G>(G*) {
    const auto start = [&](auto* kernel) {
      return launch(kernel, blocks_for(rows), kThreads, stream, static_cast<const G*>(grad), codes,
                    scales, by_row, by_column, direction, rows, columns,
                    CautiousStep{share, eps, correction}, cautious != 0, each, seed, first, stride);
    };
    return bits == 4 ? start(cautious_rows_kernel<true, G>) : start(cautious_rows_kernel<false, G>);
  });
}
