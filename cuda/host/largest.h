// The largest magnitude of a block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/common.h"

namespace lowrank {

// NaN if there is one: as integers, which vectorise.
inline float largest(const float* x, std::int64_t length) {
  std::uint32_t magnitude = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    magnitude = std::max(magnitude, bits_of(x[i]) & 0x7FFFFFFFu);
  }
  return float_of(magnitude);
}

}  // namespace lowrank
