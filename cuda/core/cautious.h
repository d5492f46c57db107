// Cautious updates with a momentum quantised by rows; see cuda/cautious.py and
// cuda/row_quantized.py.
#pragma once

#include "noise.h"

namespace lowrank {

constexpr int kRowBlock = 128;  // entries that share a scale
constexpr float kLeastShare = 1e-3f;

struct CautiousStep {
  float share;  // 1 - b1
  float eps;
  float correction;  // 1 - b1^t
};

// Advances the momentum; returns the direction before the mask.
LR_HD float cautious_entry(float grad, float& m, float row, float column,
                           const CautiousStep& step) {
  m += step.share * (grad - m);
  return m / ((row * column + step.eps) * step.correction);
}

LR_HD bool agree(float a, float b) { return (a > 0.0f && b > 0.0f) || (a < 0.0f && b < 0.0f); }

// What the directions of entries that agree are multiplied by; `each` is 1 over the columns.
LR_HD float cautious_factor(int agreeing, float each) {
  const float share = static_cast<float>(agreeing) * each;
  return 1.0f / (share < kLeastShare ? kLeastShare : share);
}

template <bool kFour>
struct RowCodes {
  static constexpr float kLargest = kFour ? 7.0f : 127.0f;

  // Of a block, from its largest magnitude. PyTorch's CUDA kernels divide by a number that way.
  LR_HD static float scale(float largest) { return largest * (1.0f / kLargest); }

  // Four bits are rounded up or down by the noise, eight to the nearest code. NaN has code 0.
  LR_HD static int code(float unit, float noise) {
    const float bounded = clamp(kFour ? floorf(unit + noise) : rintf(unit), -kLargest, kLargest);
    return is_nan(bounded) ? 0 : static_cast<int>(bounded);
  }
};

// The number that the lowest four bits of a code stand for.
LR_HD int signed_half(int code) { return ((code & 15) ^ 8) - 8; }

}  // namespace lowrank
