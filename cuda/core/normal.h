// Normal numbers that are a function of a seed and a position; see cuda/normal.py.
//
// Box-Muller on 64 random bits with additions, multiplications, divisions, square roots and integer
// operations alone. Each of these is rounded to the nearest number on every processor, and none is
// contracted with another, so the results are the same to the bit everywhere. The polynomials are
// minimax fits of our own; their errors are below the rounding of fp32.
#pragma once

#include "noise.h"

namespace lowrank {

constexpr int kNormals = 4;  // of one counter

struct NormalPair {
  float first, second;
};

// -2 ln(u) for u = (k + 1/2) / 2^31. With k + 1/2 = 2^e m, m in [sqrt(1/2), sqrt(2)), and
// s = (m - 1) / (m + 1): -2 ln(u) = 2 ln(2) (31 - e) - 2 ln((1 + s) / (1 - s)).
LR_HD float minus_two_log(std::int32_t k) {
  const float x = static_cast<float>(k) + 0.5f;
  const std::int32_t bits = static_cast<std::int32_t>(bits_of(x));
  const std::int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float m = float_of(static_cast<std::uint32_t>(bits - exponent * (1 << 23)));
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float series = ((0.598530293f * z + 0.799495161f) * z + 1.33333635f) * z + 4.0f;
  return static_cast<float>(31 - exponent) * 1.38629436f - s * series;
}

// (cos, sin) of pi t for t in [-1/2, 1/2].
LR_HD NormalPair half_turn(float t) {
  const float z = t * t;
  const float cosine =
      ((((-0.0243967157f * z + 0.234937564f) * z - 1.33521211f) * z + 4.05870914f) * z -
       4.93480206f) *
          z +
      1.0f;
  const float sine =
      ((((0.0772201270f * z - 0.598045170f) * z + 2.55003142f) * z - 5.16770697f) * z +
       3.14159250f) *
      t;
  return {cosine, sine};
}

// The upper 31 bits of `radius` give the radius, its lowest bit the sign of the cosine, and `angle`
// the angle.
LR_HD NormalPair normal_pair(std::uint32_t radius, std::uint32_t angle) {
  const float length = sqrtf(minus_two_log(static_cast<std::int32_t>(radius >> 1)));
  const std::int32_t turn = static_cast<std::int32_t>(angle ^ 0x80000000u);
  const NormalPair point = half_turn(static_cast<float>(turn) * (1.0f / 4294967296.0f));
  const float cosine = float_of(bits_of(point.first) ^ (radius << 31));
  return {length * cosine, length * point.second};
}

// Entries 4 c to 4 c + 3 for counter c.
LR_HD void normals_of(const Words& words, float* out) {
  const NormalPair low = normal_pair(words.word[0], words.word[1]);
  const NormalPair high = normal_pair(words.word[2], words.word[3]);
  out[0] = low.first;
  out[1] = low.second;
  out[2] = high.first;
  out[3] = high.second;
}

}  // namespace lowrank
