// What host and device code share: number formats and the type codes of the C interface.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define LR_HD __host__ __device__ __forceinline__
#else
#define LR_HD inline
#endif

namespace lowrank {

// Type codes of the C interface.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

LR_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

LR_HD float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

LR_HD bool is_nan(float x) { return (bits_of(x) & 0x7FFFFFFFu) > 0x7F800000u; }

LR_HD bool is_finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

// The larger number; NaN where either is.
LR_HD float max_or_nan(float a, float b) { return (a > b || is_nan(a)) ? a : b; }

LR_HD float min_or_nan(float a, float b) { return (a < b || is_nan(a)) ? a : b; }

// Integers in the order of the numbers whose patterns they come from; NaN lies beyond infinity on
// its sign's side. Largest and smallest keys are those of NaN where there is one.
LR_HD std::int32_t order_key(float x) {
  const std::int32_t bits = static_cast<std::int32_t>(bits_of(x));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

LR_HD float from_order_key(std::int32_t key) {
  return float_of(static_cast<std::uint32_t>(key ^ ((key >> 31) & 0x7FFFFFFF)));
}

// What entries are multiplied by to be divided by a scale that is not negative. A scale of zero, or
// one whose reciprocal may be infinite, belongs to entries that are as good as zero: these stay.
LR_HD float reciprocal(float scale) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  return scale < kSmallestNormal ? 1.0f : 1.0f / scale;
}

LR_HD float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

LR_HD float to_float(float x) { return x; }

LR_HD float to_float(bfloat16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

LR_HD float to_float(float16 x) {
#if defined(__CUDACC__)
  __half_raw raw;
  raw.x = x.bits;
  return __half2float(__half(raw));
#else
  _Float16 half;
  memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
#endif
}

// To the nearest number, ties to even.
template <typename T>
LR_HD T from_float(float x);

template <>
LR_HD float from_float<float>(float x) {
  return x;
}

template <>
LR_HD bfloat16 from_float<bfloat16>(float x) {
  const std::uint32_t bits = bits_of(x);
  if (is_nan(x)) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
LR_HD float16 from_float<float16>(float x) {
#if defined(__CUDACC__)
  return {static_cast<__half_raw>(__float2half_rn(x)).x};
#else
  const _Float16 half = static_cast<_Float16>(x);
  float16 result;
  memcpy(&result.bits, &half, sizeof(half));
  return result;
#endif
}

// The smallest number of type T that is not below a positive x.
template <typename T>
LR_HD T ceil_to(float x) {
  T nearest = from_float<T>(x);
  // The next number of a positive half-precision one has the next pattern.
  if (to_float(nearest) < x) ++nearest.bits;
  return nearest;
}

template <>
LR_HD float ceil_to<float>(float x) {
  return x;
}

// Element `i` of an array whose type is only known when it runs, as the scales of groups are.
LR_HD float load(const void* data, int dtype, std::int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == kBfloat16) return to_float(static_cast<const bfloat16*>(data)[i]);
  return to_float(static_cast<const float16*>(data)[i]);
}

LR_HD void store(void* data, int dtype, std::int64_t i, float x) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == kBfloat16) {
    static_cast<bfloat16*>(data)[i] = from_float<bfloat16>(x);
  } else {
    static_cast<float16*>(data)[i] = from_float<float16>(x);
  }
}

LR_HD float ceil_to_dtype(float x, int dtype) {
  if (dtype == kFloat32) return x;
  if (dtype == kBfloat16) return to_float(ceil_to<bfloat16>(x));
  return to_float(ceil_to<float16>(x));
}

}  // namespace lowrank
