// Fira's limiter on the host.
#include "../core/growth.h"

#include "../core/api.h"

using namespace lowrank;

int lowrank_limit_growth(int count, float* const* stored, const float* norms,
                         const std::uint8_t* good, float* factors, float limit, void*) {
  for (int t = 0; t < count; ++t) {
    const float norm = good == nullptr || good[t] != 0 ? norms[t] : *stored[t];
    factors[t] = limited_growth(norm, *stored[t], limit);
  }
  return 0;
}
