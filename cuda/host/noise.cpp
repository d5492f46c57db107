// Random signs and stochastic rounding on the host.
#include "../core/noise.h"

#include "../core/api.h"
#include "parallel.h"

using namespace lowrank;

int lowrank_rademacher(void* out, int dtype, std::int64_t numel, std::uint64_t key, void*) {
  return dispatch(dtype, [&]<typename T>(T*) {
    T* signs = static_cast<T*>(out);
    parallel_for(ceil_divide(numel, 128), 128, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t counter = begin; counter < end; ++counter) {
        const Words words = philox(key, static_cast<std::uint64_t>(counter));
        const std::int64_t start = counter * 128;
        const int length = static_cast<int>(std::min<std::int64_t>(128, numel - start));
        T fresh[128];
        for (int bit = 0; bit < 128; ++bit) fresh[bit] = from_float<T>(sign_of_bit(words, bit));
        std::copy(fresh, fresh + length, signs + start);
      }
    });
    return 0;
  });
}

int lowrank_stochastic_bfloat16(const float* x, std::uint16_t* out, std::int64_t numel,
                                std::uint64_t seed, std::uint64_t first, void*) {
  parallel_for(numel, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      out[i] = stochastic_bfloat16(x[i], seed, first + static_cast<std::uint64_t>(i)).bits;
    }
  });
  return 0;
}
