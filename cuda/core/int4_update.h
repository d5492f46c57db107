// A step's rounding of a weight in four bits; see cuda/int4_update.py.
#pragma once

#include "groups.h"

namespace lowrank {

// Scales per largest entry: the smallest whose codes reach it, with headroom, and what is too wide.
constexpr float kNeeded = static_cast<float>(1.0 / 7.5);
constexpr float kHeadroom = static_cast<float>(1.1);
constexpr float kTooWide = 1.5f;

// The present scale of a group, or a new one where it is too narrow or too wide.
LR_HD float fitting_scale(float largest, float present, int dtype) {
  const float needed = largest * kNeeded;
  // False where one is NaN: a group that isn't finite gets such a scale, which is seen.
  if (needed <= present && present <= needed * kTooWide) return present;
  return ceil_to_dtype(needed * kHeadroom, dtype);
}

// What `turn` golden sections add to a number of 24 bits.
LR_HD std::uint32_t turned(std::int64_t turn) {
  return static_cast<std::uint32_t>(turn) * 0x9E3779u & 0xFFFFFFu;
}

// In [0, 1): `uniform` of the position, moved by what `turned` gives.
LR_HD float spread_uniform(std::uint64_t seed, std::uint64_t position, std::uint32_t moved) {
  const std::uint32_t bits = (random_bits(seed, position) >> 8) + moved;
  return static_cast<float>(bits & 0xFFFFFFu) * (1.0f / 16777216.0f);
}

LR_HD std::uint8_t spread_code(float x, float scale, float noise) {
  return code_of(floorf(x / (scale == 0.0f ? 1.0f : scale) + kMiddle + noise), 15.0f);
}

}  // namespace lowrank
