// Two codes a byte, and one a byte.
#pragma once

#include <cstdint>

namespace lowrank {

// The last upper half is 0 where `length` is odd. Codes are bytes, which may alias everything:
// hence __restrict__.
inline void pack(const std::uint8_t* __restrict__ codes, std::int64_t length,
                 std::uint8_t* __restrict__ packed) {
  for (std::int64_t i = 0; i < length / 2; ++i) {
    packed[i] = static_cast<std::uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
  }
  if (length % 2 != 0) packed[length / 2] = codes[length - 1];
}

inline void unpack(const std::uint8_t* __restrict__ packed, std::int64_t length,
                   std::uint8_t* __restrict__ codes) {
  for (std::int64_t i = 0; i < length / 2; ++i) {
    codes[2 * i] = packed[i] & 15;
    codes[2 * i + 1] = packed[i] >> 4;
  }
  if (length % 2 != 0) codes[length - 1] = packed[length / 2] & 15;
}

}  // namespace lowrank
