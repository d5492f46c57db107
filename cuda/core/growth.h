// Fira's bound on the growth of a norm; see cuda/growth.py.
#pragma once

#include "common.h"

namespace lowrank {

// The factor on what has `norm`. `stored` is the norm after the last step, 0 for none, and becomes
// that after this one.
LR_HD float limited_growth(float norm, float& stored, float limit) {
  const bool none = stored <= 0.0f;
  const float largest = none ? float_of(0x7F800000u) : (stored + 1e-8f) * limit;
  const float quotient = largest / norm;
  stored = min_or_nan(norm, largest);
  return none || quotient > 1.0f ? 1.0f : quotient;
}

}  // namespace lowrank
