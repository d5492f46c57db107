// Cautious updates with a quantised momentum on the host, row by row.
#include "../core/cautious.h"

#include "../core/api.h"
#include "largest.h"
#include "parallel.h"

using namespace lowrank;

namespace {

// One block of a row. Codes are bytes, which may alias everything: hence __restrict__.

template <bool kFour>
void read_codes(const std::uint8_t* __restrict__ codes, std::int64_t length, float scale,
                float* __restrict__ m) {
  if constexpr (kFour) {
    for (std::int64_t i = 0; i < length / 2; ++i) {
      m[2 * i] = static_cast<float>(signed_half(codes[i])) * scale;
      m[2 * i + 1] = static_cast<float>(signed_half(codes[i] >> 4)) * scale;
    }
    if (length % 2 != 0) {
      m[length - 1] = static_cast<float>(signed_half(codes[length / 2])) * scale;
    }
  } else {
    for (std::int64_t i = 0; i < length; ++i) {
      m[i] = static_cast<float>(static_cast<std::int8_t>(codes[i])) * scale;
    }
  }
}

template <typename G>
int advance(const G* __restrict__ grad, float* __restrict__ m, const float* __restrict__ by_column,
            float* __restrict__ direction, std::int64_t length, float row,
            const CautiousStep& step) {
  int agreeing = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    const float g = to_float(grad[i]);
    float moment = m[i];
    const float d = cautious_entry(g, moment, row, by_column[i], step);
    m[i] = moment;
    direction[i] = d;
    agreeing += agree(d, g) ? 1 : 0;
  }
  return agreeing;
}

template <bool kFour>
void write_codes(const float* __restrict__ m, std::int64_t length, float inverse,
                 std::uint64_t seed, std::uint64_t first, std::uint8_t* __restrict__ codes) {
  std::uint8_t fresh[kRowBlock];
  for (std::int64_t i = 0; i < length; ++i) {
    const float noise = kFour ? uniform(seed, first + static_cast<std::uint64_t>(i)) : 0.0f;
    fresh[i] = static_cast<std::uint8_t>(RowCodes<kFour>::code(m[i] * inverse, noise));
  }
  if constexpr (kFour) {
    for (std::int64_t i = 0; i < length / 2; ++i) {
      codes[i] = static_cast<std::uint8_t>((fresh[2 * i] & 15) | (fresh[2 * i + 1] << 4));
    }
    if (length % 2 != 0) codes[length / 2] = fresh[length - 1] & 15;
  } else {
    std::copy(fresh, fresh + length, codes);
  }
}

template <typename G>
void apply_mask(const G* __restrict__ grad, float* __restrict__ direction, std::int64_t columns,
                float factor) {
  for (std::int64_t j = 0; j < columns; ++j) {
    const float d = direction[j];
    direction[j] = d * (agree(d, to_float(grad[j])) ? factor : 0.0f);
  }
}

template <bool kFour, typename G>
void row_update(const G* grad, std::uint8_t* codes, float* scales, float row,
                const float* by_column, float* direction, std::int64_t columns,
                const CautiousStep& step, bool cautious, float each, std::uint64_t seed,
                std::uint64_t first) {
  float m[kRowBlock];
  int agreeing = 0;
  for (std::int64_t start = 0; start < columns; start += kRowBlock, ++scales) {
    const std::int64_t length = std::min<std::int64_t>(kRowBlock, columns - start);
    std::uint8_t* own = codes + (kFour ? start / 2 : start);
    read_codes<kFour>(own, length, *scales, m);
    agreeing += advance(grad + start, m, by_column + start, direction + start, length, row, step);
    *scales = RowCodes<kFour>::scale(largest(m, length));
    write_codes<kFour>(m, length, reciprocal(*scales), seed,
                       first + static_cast<std::uint64_t>(start), own);
  }
  if (cautious) apply_mask(grad, direction, columns, cautious_factor(agreeing, each));
}

}  // namespace

int lowrank_cautious_rows(const void* grad, int dtype, std::uint8_t* codes, float* scales,
                          const float* by_row, const float* by_column, float* direction,
                          std::int64_t rows, std::int64_t columns, int bits, int cautious,
                          float share, float eps, float correction, float each, std::uint64_t seed,
                          std::uint64_t first, std::int64_t stride, void*) {
  const CautiousStep step = {share, eps, correction};
  const std::int64_t bytes = ceil_divide(columns * bits, 8);
  const std::int64_t blocks = ceil_divide(columns, kRowBlock);
  return dispatch(dtype, [&]<typename G>(G*) {
    const auto all = [&](const auto& update) {
      parallel_for(rows, columns, kComputed, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          update(static_cast<const G*>(grad) + i * columns, codes + i * bytes, scales + i * blocks,
                 by_row[i], by_column, direction + i * columns, columns, step, cautious != 0, each,
                 seed, first + static_cast<std::uint64_t>(i * stride));
        }
      });
      return 0;
    };
    return bits == 4 ? all(row_update<true, G>) : all(row_update<false, G>);
  });
}
