// Quantisation in groups of 8-bit and 4-bit codes: a warp takes a group.
#include "../core/api.h"
#include "../core/groups.h"
#include "warp.h"

namespace lowrank {
namespace {

constexpr int kNf4Values = 16;

struct Range {
  float low, high;
};

__device__ __forceinline__ Range widen(Range range, const float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    range.low = min_or_nan(range.low, values[i]);
    range.high = max_or_nan(range.high, values[i]);
  }
  return range;
}

// The range of a group with zero in it, which none of the formats minds.
template <typename T>
__device__ __forceinline__ Range range_of(const T* x, std::int64_t mine, std::int64_t stop,
                                          const float (&kept)[kVector]) {
  Range range = widen({0.0f, 0.0f}, kept);
  for (std::int64_t at = mine + kWarpSpan; at < stop; at += kWarpSpan) {
    float others[kVector];
    load_floats(x + at, stop - at, others);
    range = widen(range, others);
  }
  return {warp_min(range.low), warp_max(range.high)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* x, std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                    std::int64_t numel, std::int64_t group, float levels, float share,
                    bool stochastic, std::uint64_t seed, std::uint64_t first) {
  const std::int64_t groups = ceil_divide(numel, group);
  for (std::int64_t g = warp_index(); g < groups; g += warp_count()) {
    const std::int64_t stop = (g + 1) * group < numel ? (g + 1) * group : numel;
    const std::int64_t mine = g * group + lane_index() * kVector;
    float kept[kVector];
    load_floats(x + mine, stop - mine, kept);
    const Range range = range_of(x, mine, stop, kept);
    const GroupParameters own =
        group_parameters(range.low, range.high, kAffine, levels, share, scale_dtype);
    if (lane_index() == 0) {
      store(scales, scale_dtype, g, own.scale);
      store(zeros, scale_dtype, g, own.zero);
    }
    for (std::int64_t at = mine; at < stop; at += kWarpSpan) {
      if (at != mine) load_floats(x + at, stop - at, kept);
      Vector<std::uint8_t> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        result.entry[i] = stochastic ? stochastic_code(kept[i], own, levels, seed,
                                                       first + static_cast<std::uint64_t>(at + i))
                                     : affine_code(kept[i], own, levels);
      }
      store_vector(codes + at, result, stop - at);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const std::uint8_t* codes, const void* scales, const void* zeros,
                      int scale_dtype, T* out, std::int64_t numel, std::int64_t group) {
  const std::int64_t groups = ceil_divide(numel, group);
  for (std::int64_t g = warp_index(); g < groups; g += warp_count()) {
    const std::int64_t stop = (g + 1) * group < numel ? (g + 1) * group : numel;
    const GroupParameters own{load(scales, scale_dtype, g), load(zeros, scale_dtype, g)};
    for (std::int64_t at = g * group + lane_index() * kVector; at < stop; at += kWarpSpan) {
      const Vector<std::uint8_t> loaded = load_vector(codes + at, stop - at);
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = value_of(loaded.entry[i], own, kAffine, nullptr);
      }
      store_floats(out + at, stop - at, values);
    }
  }
}

// Eight codes in four bytes; `at` is even.
__device__ __forceinline__ void store_codes(std::uint8_t* codes, std::int64_t at,
                                            std::int64_t count, std::uint32_t packed) {
  std::uint8_t* target = codes + at / 2;
  if (count >= kVector && reinterpret_cast<std::uintptr_t>(target) % 4 == 0) {
    *reinterpret_cast<std::uint32_t*>(target) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    if (2 * i < count) target[i] = static_cast<std::uint8_t>(packed >> (8 * i));
  }
}

__device__ __forceinline__ std::uint32_t load_codes(const std::uint8_t* codes, std::int64_t at,
                                                    std::int64_t count) {
  const std::uint8_t* source = codes + at / 2;
  if (count >= kVector && reinterpret_cast<std::uintptr_t>(source) % 4 == 0) {
    return *reinterpret_cast<const std::uint32_t*>(source);
  }
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    if (2 * i < count) packed |= static_cast<std::uint32_t>(source[i]) << (8 * i);
  }
  return packed;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_int4_kernel(const T* x, std::uint8_t* codes, void* scales, void* zeros,
                         int scale_dtype, std::int64_t numel, std::int64_t group, int format,
                         float share, const float* nf4) {
  __shared__ float values[kNf4Values];
  if (format == kNf4) stage(values, nf4, kNf4Values);
  __syncthreads();
  const std::int64_t groups = ceil_divide(numel, group);
  for (std::int64_t g = warp_index(); g < groups; g += warp_count()) {
    const std::int64_t stop = (g + 1) * group < numel ? (g + 1) * group : numel;
    const std::int64_t mine = g * group + lane_index() * kVector;
    float kept[kVector];
    load_floats(x + mine, stop - mine, kept);
    const Range range = range_of(x, mine, stop, kept);
    const GroupParameters own =
        group_parameters(range.low, range.high, format, 15.0f, share, scale_dtype);
    if (lane_index() == 0) {
      store(scales, scale_dtype, g, own.scale);
      if (format == kAffine) store(zeros, scale_dtype, g, own.zero);
    }
    for (std::int64_t at = mine; at < stop; at += kWarpSpan) {
      if (at != mine) load_floats(x + at, stop - at, kept);
      std::uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const std::uint32_t code = int4_code(kept[i], own, format, values);
        if (at + i < stop) packed |= code << (4 * i);
      }
      store_codes(codes, at, stop - at, packed);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int4_kernel(const std::uint8_t* codes, const void* scales, const void* zeros,
                           int scale_dtype, T* out, std::int64_t numel, std::int64_t group,
                           int format, const float* nf4) {
  __shared__ float values[kNf4Values];
  if (format == kNf4) stage(values, nf4, kNf4Values);
  __syncthreads();
  const std::int64_t groups = ceil_divide(numel, group);
  for (std::int64_t g = warp_index(); g < groups; g += warp_count()) {
    const std::int64_t stop = (g + 1) * group < numel ? (g + 1) * group : numel;
    const float zero = format == kAffine ? load(zeros, scale_dtype, g) : 0.0f;
    const GroupParameters own{load(scales, scale_dtype, g), zero};
    for (std::int64_t at = g * group + lane_index() * kVector; at < stop; at += kWarpSpan) {
      const std::uint32_t packed = load_codes(codes, at, stop - at);
      float dense[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const std::uint8_t code = static_cast<std::uint8_t>((packed >> (4 * i)) & 15u);
        dense[i] = value_of(code, own, format, values);
      }
      store_floats(out + at, stop - at, dense);
    }
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_quantize_groups(const void* x, int dtype, std::uint8_t* codes, void* scales,
                            void* zeros, int scale_dtype, std::int64_t numel, std::int64_t group,
                            int levels, int stochastic, std::uint64_t seed, std::uint64_t first,
                            void* stream) {
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(quantize_kernel<T>, blocks_for(ceil_divide(numel, group)), kThreads, stream,
                  static_cast<const T*>(x), codes, scales, zeros, scale_dtype, numel, group,
                  static_cast<float>(levels), 1.0f / static_cast<float>(levels), stochastic != 0,
                  seed, first);
  });
}

int lowrank_dequantize_groups(const std::uint8_t* codes, const void* scales, const void* zeros,
                              int scale_dtype, void* out, int dtype, std::int64_t numel,
                              std::int64_t group, void* stream) {
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(dequantize_kernel<T>, blocks_for(ceil_divide(numel, group)), kThreads, stream,
                  codes, scales, zeros, scale_dtype, static_cast<T*>(out), numel, group);
  });
}

int lowrank_quantize_int4(const void* x, int dtype, std::uint8_t* codes, void* scales, void* zeros,
                          int scale_dtype, std::int64_t numel, std::int64_t group, int format,
                          float share, const float* values, void* stream) {
  if (group % 2 != 0) return 1;
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(quantize_int4_kernel<T>, blocks_for(ceil_divide(numel, group)), kThreads, stream,
                  static_cast<const T*>(x), codes, scales, zeros, scale_dtype, numel, group, format,
                  share, values);
  });
}

int lowrank_dequantize_int4(const std::uint8_t* codes, const void* scales, const void* zeros,
                            int scale_dtype, void* out, int dtype, std::int64_t numel,
                            std::int64_t group, int format, const float* values, void* stream) {
  if (group % 2 != 0) return 1;
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(dequantize_int4_kernel<T>, blocks_for(ceil_divide(numel, group)), kThreads,
                  stream, codes, scales, zeros, scale_dtype, static_cast<T*>(out), numel, group,
                  format, values);
  });
}
