// Quantisation in groups; see cuda/groups.py (affine) and cuda/int4.py (mid-rise, NF4).
#pragma once

#include "noise.h"

namespace lowrank {

enum Format : int { kAffine = 0, kMidrise = 1, kNf4 = 2 };

constexpr float kSmallestRange = 1e-5f;
constexpr float kMiddle = 7.5f;

struct GroupParameters {
  float scale;
  float zero;  // 0 in the symmetric formats
};

// From the smallest and largest entry of a group. A scale is a multiple, by `share`, of the range
// or (symmetric formats) of max|x|: 1 / levels, 0.85 / 7.5 or 1, each rounded to fp32. PyTorch's
// CUDA kernels divide by a number that way; a quotient would differ from theirs in the last bit.
LR_HD GroupParameters group_parameters(float low, float high, int format, float levels, float share,
                                       int dtype) {
  if (format != kAffine) {
    return {ceil_to_dtype(fabsf(max_or_nan(high, -low)) * share, dtype), 0.0f};
  }
  low = min_or_nan(low, 0.0f);
  high = max_or_nan(high, 0.0f);
  const float scale = ceil_to_dtype(max_or_nan(high - low, kSmallestRange) * share, dtype);
  // Subtracted from 0: the zero point is never -0, which processors clamp differently.
  return {scale, clamp(0.0f - rintf(low / scale), 0.0f, levels)};
}

LR_HD std::uint8_t code_of(float rounded, float levels) {
  const float bounded = clamp(rounded, 0.0f, levels);
  return static_cast<std::uint8_t>(is_nan(bounded) ? 0 : static_cast<int>(bounded));
}

LR_HD std::uint8_t affine_code(float x, GroupParameters group, float levels) {
  return code_of(rintf(x / group.scale) + group.zero, levels);
}

LR_HD std::uint8_t stochastic_code(float x, GroupParameters group, float levels, std::uint64_t seed,
                                   std::uint64_t position) {
  return code_of(floorf(x / group.scale + uniform(seed, position)) + group.zero, levels);
}

// `values` are the 16 values of NF4.
LR_HD std::uint8_t symmetric_code(float x, float scale, int format, const float* values) {
  const float unit = x / (scale == 0.0f ? 1.0f : scale);
  if (format == kMidrise) return code_of(rintf(unit + kMiddle), 15.0f);
  int code = 0;
  for (int i = 0; i < 15; ++i) code += unit > (values[i] + values[i + 1]) * 0.5f;
  return static_cast<std::uint8_t>(code);
}

LR_HD std::uint8_t int4_code(float x, GroupParameters group, int format, const float* values) {
  return format == kAffine ? affine_code(x, group, 15.0f)
                           : symmetric_code(x, group.scale, format, values);
}

LR_HD float value_of(std::uint8_t code, GroupParameters group, int format, const float* values) {
  if (format == kNf4) return values[code] * group.scale;
  const float middle = format == kMidrise ? kMiddle : group.zero;
  return (static_cast<float>(code) - middle) * group.scale;
}

}  // namespace lowrank
