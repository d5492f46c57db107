// Quantisation in groups; see cuda/groups.py (affine) and cuda/int4.py (mid-rise, NF4).
#pragma once

#include "noise.h"

namespace lowrank {

enum Format : int { kAffine = 0, kMidrise = 1, kNf4 = 2 };

constexpr float kSmallestRange = 1e-5f;
constexpr float kMiddle = 7.5f;

struct GroupParameters {
  float scale;
  float zero;            // 0 in the symmetric formats
  float inverse = 0.0f;  // what entries are multiplied by; not known of stored ones
};

// From the smallest and largest entry of a group. A scale is a multiple, by `share`, of the range
// or (symmetric formats) of max|x|: 1 / levels, 0.85 / 7.5 or 1, each rounded to fp32. PyTorch's
// CUDA kernels divide by a number that way; a quotient would differ from theirs in the last bit.
LR_HD GroupParameters group_parameters(float low, float high, int format, float levels, float share,
                                       int dtype) {
  if (format != kAffine) {
    const float scale = ceil_to_dtype(fabsf(max_or_nan(high, -low)) * share, dtype);
    return {scale, 0.0f, reciprocal(scale)};
  }
  low = min_or_nan(low, 0.0f);
  high = max_or_nan(high, 0.0f);
  const float scale = ceil_to_dtype(max_or_nan(high - low, kSmallestRange) * share, dtype);
  const float inverse = 1.0f / scale;
  // Subtracted from 0: the zero point is never -0, which processors clamp differently.
  return {scale, clamp(0.0f - rintf(low * inverse), 0.0f, levels), inverse};
}

// NaN has code 0.
LR_HD std::uint8_t code_of(float rounded, float levels) {
#if defined(__CUDA_ARCH__)
  // These give the other number where one is NaN.
  return static_cast<std::uint8_t>(__float2int_rz(fminf(fmaxf(rounded, 0.0f), levels)));
#else
  const float bounded = clamp(rounded, 0.0f, levels);
  return static_cast<std::uint8_t>(is_nan(bounded) ? 0 : static_cast<int>(bounded));
#endif
}

LR_HD std::uint8_t affine_code(float x, GroupParameters group, float levels) {
  return code_of(rintf(x * group.inverse) + group.zero, levels);
}

LR_HD std::uint8_t stochastic_code(float x, GroupParameters group, float levels, std::uint64_t seed,
                                   std::uint64_t position) {
  return code_of(floorf(x * group.inverse + uniform(seed, position)) + group.zero, levels);
}

LR_HD std::uint8_t midrise_code(float x, GroupParameters group) {
  return code_of(rintf(x * group.inverse + kMiddle), 15.0f);
}

// The numbers between NF4's 16 values at which codes change.
constexpr int kMidpoints = 15;

LR_HD float midpoint(const float* values, int i) { return (values[i] + values[i + 1]) * 0.5f; }

// How many midpoints lie below. Compilers vectorise it over entries.
LR_HD std::uint8_t nf4_code(float x, GroupParameters group, const float* midpoints) {
  const float unit = x * group.inverse;
  int code = 0;
  for (int i = 0; i < kMidpoints; ++i) code += unit > midpoints[i];
  return static_cast<std::uint8_t>(code);
}

// The same by bisection.
LR_HD std::uint8_t nf4_code_bisected(float x, GroupParameters group, const float* midpoints) {
  const float unit = x * group.inverse;
  int code = unit > midpoints[7] ? 8 : 0;
  code += unit > midpoints[code + 3] ? 4 : 0;
  code += unit > midpoints[code + 1] ? 2 : 0;
  code += unit > midpoints[code] ? 1 : 0;
  return static_cast<std::uint8_t>(code);
}

LR_HD float value_of(std::uint8_t code, GroupParameters group, int format, const float* values) {
  if (format == kNf4) return values[code] * group.scale;
  const float middle = format == kMidrise ? kMiddle : group.zero;
  return (static_cast<float>(code) - middle) * group.scale;
}

}  // namespace lowrank
