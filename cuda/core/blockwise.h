// Codes of the dynamic 8-bit maps; see cuda/blockwise.py, whose tables these are.
#pragma once

#include "common.h"

namespace lowrank {

// The upper 16 bits of an fp32 magnitude in (0, 1] select an entry; smaller magnitudes than those
// of the first one have rank 0.
constexpr int kFirstEntry = 0x3300;  // 2^-25
constexpr int kLastEntry = 0x3F80;   // 1
constexpr int kEntries = kLastEntry - kFirstEntry + 1;

// An entry is (rank << 16) + 0xFFFF - threshold, so that adding the lower 16 bits of the magnitude
// makes the one comparison that is left: the carry is its result.
LR_HD int rank_of(std::uint32_t magnitude, const std::int32_t* table) {
  int upper = static_cast<int>(magnitude >> 16);
  if (upper < kFirstEntry) return 0;
  if (upper > kLastEntry) upper = kLastEntry;  // NaN
  const std::uint32_t entry = static_cast<std::uint32_t>(table[upper - kFirstEntry]);
  return static_cast<int>((entry + (magnitude & 0xFFFFu)) >> 16);
}

// Code of x / absmax. `zero` is the code of 0: 127 in the signed map, 0 in the unsigned one.
LR_HD std::uint8_t dynamic_code(float ratio, const std::int32_t* table, int zero) {
  const std::uint32_t bits = bits_of(ratio);
  const int rank = rank_of(bits & 0x7FFFFFFFu, table);
  if (!(bits >> 31)) return static_cast<std::uint8_t>(zero + rank);
  if (zero == 0) return 0;
  // -1 is not in the signed map: the lowest code belongs to the last fraction.
  return static_cast<std::uint8_t>(zero - (rank < zero ? rank : zero));
}

// What a block is divided by; any positive number gives a block of zeros the code of 0.
LR_HD float block_divisor(float absmax) { return absmax == 0.0f ? 1.0f : absmax; }

}  // namespace lowrank
