// Random numbers that are a function of a seed and a position; see cuda/noise.py.
#pragma once

#include "common.h"

namespace lowrank {

// The hash of one position: 32 random bits.
LR_HD std::uint32_t random_bits(std::uint64_t seed, std::uint64_t position) {
  std::uint32_t x =
      static_cast<std::uint32_t>(position) * 0x9E3779B1u + static_cast<std::uint32_t>(seed);
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x = (x ^ static_cast<std::uint32_t>(seed >> 32)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// One round of `mix` of cuda/noise.py: takes a number into a state.
LR_HD std::uint64_t mixed(std::uint64_t state, std::uint64_t part) {
  state += 0x9E3779B97F4A7C15u + part;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

// The seed of a draw in the step after `steps_done` others.
LR_HD std::uint64_t step_seed(std::uint64_t state, float steps_done, std::uint64_t purpose) {
  return mixed(mixed(state, static_cast<std::uint64_t>(steps_done)), purpose);
}

// In [0, 1), a multiple of 2^-24.
LR_HD float uniform(std::uint64_t seed, std::uint64_t position) {
  return static_cast<float>(random_bits(seed, position) >> 8) * (1.0f / 16777216.0f);
}

// Rounds up or down with probabilities that keep the mean; infinities and NaN stay.
LR_HD bfloat16 stochastic_bfloat16(float x, std::uint64_t seed, std::uint64_t position) {
  if (!is_finite(x)) return from_float<bfloat16>(x);
  const std::uint32_t raised = bits_of(x) + (random_bits(seed, position) & 0xFFFFu);
  return {static_cast<std::uint16_t>(raised >> 16)};
}

struct Words {
  std::uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 128 random
// bits from a 64-bit key and a 128-bit counter. Its lower half says where in a tensor the bits
// belong, its upper half what they are for.
enum Purpose : std::uint32_t { kForSigns = 0, kForNormals = 1 };

LR_HD Words philox(std::uint64_t key, std::uint64_t counter, Purpose purpose) {
  std::uint32_t c0 = static_cast<std::uint32_t>(counter);
  std::uint32_t c1 = static_cast<std::uint32_t>(counter >> 32);
  std::uint32_t c2 = purpose, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
    const std::uint64_t second = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<std::uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(second);
    c2 = static_cast<std::uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 1 for 0 and -1 for 1.
LR_HD float sign_of(std::uint32_t bit) { return float_of(0x3F800000u | (bit << 31)); }

// The sign of bit `bit` (0 to 127) of 128 random ones.
LR_HD float sign_of_bit(const Words& words, int bit) {
  return sign_of((words.word[bit >> 5] >> (bit & 31)) & 1u);
}

}  // namespace lowrank
