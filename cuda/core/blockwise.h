// Codes of the dynamic 8-bit maps; see cuda/blockwise.py, whose tables these are.
#pragma once

#include "common.h"

namespace lowrank {

// The upper 16 bits of an fp32 magnitude up to 1 select an entry. The first entry belongs to all
// that is smaller than 2^-25, which has the lowest rank (0, in the unsigned map 1), the second one
// to 2^-25.
constexpr int kFirstEntry = 0x3300 - 1;
constexpr int kLastEntry = 0x3F80;  // 1, and NaN
constexpr int kEntries = kLastEntry - kFirstEntry + 1;

// An entry is (rank << 16) + 0xFFFF - threshold, so that adding the lower 16 bits of the magnitude
// makes the one comparison that is left: the carry is its result.
LR_HD int rank_of(std::int32_t magnitude, const std::int32_t* table) {
  int upper = magnitude >> 16;
  upper = upper < kFirstEntry ? kFirstEntry : upper;
  upper = upper > kLastEntry ? kLastEntry : upper;
  return (table[upper - kFirstEntry] + (magnitude & 0xFFFF)) >> 16;
}

// Code of x * reciprocal(absmax). `zero` is the code of 0: 127 in the signed map, 0 in the unsigned
// one. -1 is not in the signed map: its lowest code belongs to the last fraction.
LR_HD std::uint8_t dynamic_code(float ratio, const std::int32_t* table, int zero) {
  const std::int32_t bits = static_cast<std::int32_t>(bits_of(ratio));
  const int rank = rank_of(bits & 0x7FFFFFFF, table);
  const int below = zero - (rank < zero ? rank : zero);
  return static_cast<std::uint8_t>(bits < 0 ? below : zero + rank);
}

}  // namespace lowrank
