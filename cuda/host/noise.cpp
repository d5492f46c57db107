// Random signs and stochastic rounding on the host.
#include "../core/api.h"
#include "../core/normal.h"
#include "parallel.h"

using namespace lowrank;

namespace {

constexpr int kCounters = 64;  // worked on at once

// The numbers of consecutive counters, in loops that vectorise.
void normals(std::uint64_t key, std::uint64_t counter, float* __restrict__ out) {
  std::uint32_t words[4][kCounters];
  for (int i = 0; i < kCounters; ++i) {
    const Words own = philox(key, counter + static_cast<std::uint64_t>(i), kForNormals);
    for (int j = 0; j < 4; ++j) words[j][i] = own.word[j];
  }
  for (int j = 0; j < 4; j += 2) {
    float first[kCounters], second[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      const NormalPair pair = normal_pair(words[j][i], words[j + 1][i]);
      first[i] = pair.first;
      second[i] = pair.second;
    }
    for (int i = 0; i < kCounters; ++i) {
      out[kNormals * i + j] = first[i];
      out[kNormals * i + j + 1] = second[i];
    }
  }
}

// Numbers `first` and following, times `scale`.
int fill_normals(void* out, int dtype, std::int64_t numel, std::uint64_t key, std::uint64_t first,
                 float scale) {
  constexpr std::int64_t kPart = kCounters * kNormals;
  const std::int64_t skip = static_cast<std::int64_t>(first % kNormals);
  return dispatch(dtype, [&]<typename T>(T*) {
    T* numbers = static_cast<T*>(out);
    parallel_for(ceil_divide(numel + skip, kPart), kPart, kComputed,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t part = begin; part < end; ++part) {
                     float fresh[kPart];
                     normals(key, first / kNormals + static_cast<std::uint64_t>(part * kCounters),
                             fresh);
                     const std::int64_t start = part * kPart - skip;
                     const std::int64_t from = std::max<std::int64_t>(0, -start);
                     const std::int64_t to = std::min(kPart, numel - start);
                     for (std::int64_t i = from; i < to; ++i)
                       numbers[start + i] = from_float<T>(fresh[i] * scale);
                   }
                 });
    return 0;
  });
}

}  // namespace

int lowrank_rademacher(void* out, int dtype, std::int64_t numel, std::uint64_t key, void*) {
  return dispatch(dtype, [&]<typename T>(T*) {
    T* signs = static_cast<T*>(out);
    parallel_for(ceil_divide(numel, 128), 128, kCopied, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t counter = begin; counter < end; ++counter) {
        const Words words = philox(key, static_cast<std::uint64_t>(counter), kForSigns);
        const std::int64_t start = counter * 128;
        const int length = static_cast<int>(std::min<std::int64_t>(128, numel - start));
        T fresh[128];
        for (int word = 0; word < 4; ++word) {
          const std::uint32_t bits = words.word[word];
          for (int bit = 0; bit < 32; ++bit) {
            fresh[32 * word + bit] = from_float<T>(sign_of((bits >> bit) & 1u));
          }
        }
        std::copy(fresh, fresh + length, signs + start);
      }
    });
    return 0;
  });
}

int lowrank_gaussian(void* out, int dtype, std::int64_t numel, std::uint64_t key,
                     const std::int64_t* device_key, std::uint64_t first, void*) {
  if (device_key != nullptr) key = static_cast<std::uint64_t>(*device_key);
  return fill_normals(out, dtype, numel, key, first, 1.0f);
}

int lowrank_gaussian_list(int count, void* const* outs, const std::int64_t* numels,
                          const std::uint64_t* keys, const std::int64_t* const* device_keys,
                          int dtype, float scale, void*) {
  for (int t = 0; t < count; ++t) {
    const std::uint64_t key =
        device_keys == nullptr ? keys[t] : static_cast<std::uint64_t>(*device_keys[t]);
    const int error = fill_normals(outs[t], dtype, numels[t], key, 0, scale);
    if (error != 0) return error;
  }
  return 0;
}

int lowrank_step_seeds(int count, const float* const* steps, const std::uint64_t* states,
                       std::uint64_t purpose, std::int64_t* seeds, void*) {
  for (int t = 0; t < count; ++t) {
    seeds[t] = static_cast<std::int64_t>(step_seed(states[t], *steps[t], purpose));
  }
  return 0;
}

int lowrank_stochastic_bfloat16(const float* x, std::uint16_t* out, std::int64_t numel,
                                std::uint64_t seed, std::uint64_t first,
                                const std::int64_t* device_seed, void*) {
  if (device_seed != nullptr) seed = static_cast<std::uint64_t>(*device_seed);
  parallel_for(numel, 1, kRounded, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      out[i] = stochastic_bfloat16(x[i], seed, first + static_cast<std::uint64_t>(i)).bits;
    }
  });
  return 0;
}
