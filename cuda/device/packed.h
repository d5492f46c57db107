// Two codes a byte, read and written eight at a time.
#pragma once

#include "warp.h"

namespace lowrank {

// Eight codes in four bytes; `at` is even.
__device__ __forceinline__ void store_codes(std::uint8_t* codes, std::int64_t at,
                                            std::int64_t count, std::uint32_t packed) {
  std::uint8_t* target = codes + at / 2;
  if (count >= kVector && reinterpret_cast<std::uintptr_t>(target) % 4 == 0) {
    *reinterpret_cast<std::uint32_t*>(target) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    if (2 * i < count) target[i] = static_cast<std::uint8_t>(packed >> (8 * i));
  }
}

__device__ __forceinline__ std::uint32_t load_codes(const std::uint8_t* codes, std::int64_t at,
                                                    std::int64_t count) {
  const std::uint8_t* source = codes + at / 2;
  if (count >= kVector && reinterpret_cast<std::uintptr_t>(source) % 4 == 0) {
    return *reinterpret_cast<const std::uint32_t*>(source);
  }
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    if (2 * i < count) packed |= static_cast<std::uint32_t>(source[i]) << (8 * i);
  }
  return packed;
}

}  // namespace lowrank
