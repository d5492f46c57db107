// Fira's limiter on the norms of many matrices.
#include "../core/api.h"
#include "../core/growth.h"
#include "lists.h"

namespace lowrank {
namespace {

// Where the norms of the last step are.
template <int kMost>
struct Norms : Blocks<kMost> {
  float* stored[kMost];
};

template <int kMost>
__global__ void __launch_bounds__(kThreads)
    limit_growth_kernel(const Norms<kMost> __grid_constant__ list, const float* norms,
                        const std::uint8_t* good, float* factors, float limit) {
  for (int t = static_cast<int>(threadIdx.x); t < list.count; t += kThreads) {
    float stored = *list.stored[t];
    const float norm = good == nullptr || good[t] != 0 ? norms[t] : stored;
    factors[t] = limited_growth(norm, stored, limit);
    *list.stored[t] = stored;
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_limit_growth(int count, float* const* stored, const float* norms,
                         const std::uint8_t* good, float* factors, float limit, void* stream) {
  const auto fill = [&](auto& list, int i, int t) {
    list.stored[i] = stored[t];
    return 1;
  };
  const auto start = [&]<int kMost>(const Norms<kMost>& list, int, int begin) {
    return launch(limit_growth_kernel<kMost>, 1, kThreads, stream, list, norms + begin,
                  good == nullptr ? nullptr : good + begin, factors + begin, limit);
  };
  return in_batches<Norms>(count, fill, start);
}
