// Random signs and stochastic rounding.
#include "../core/api.h"
#include "../core/normal.h"
#include "warp.h"

namespace lowrank {
namespace {

constexpr int kSigns = 128;                    // of one counter
constexpr int kLanesASign = kSigns / kVector;  // 16 lanes share a counter

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    rademacher_kernel(T* out, std::int64_t numel, std::uint64_t key) {
  const std::int64_t spans = ceil_divide(numel, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector;
    const Words words = philox(key, static_cast<std::uint64_t>(at / kSigns), kForSigns);
    const int first_bit = (lane_index() % kLanesASign) * kVector;
    float signs[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) signs[i] = sign_of_bit(words, first_bit + i);
    store_floats(out + at, numel - at, signs);
  }
}

// Lanes take two counters each. The first `first % 4` numbers lie before the tensor.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    gaussian_kernel(T* out, std::int64_t numel, std::uint64_t key, const std::int64_t* device_key,
                    std::uint64_t first) {
  if (device_key != nullptr) key = static_cast<std::uint64_t>(*device_key);
  const std::int64_t skip = static_cast<std::int64_t>(first % kNormals);
  const std::int64_t spans = ceil_divide(numel + skip, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector - skip;
    const std::uint64_t counter =
        first / kNormals + static_cast<std::uint64_t>(at + skip) / kNormals;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector / kNormals; ++i) {
      normals_of(philox(key, counter + static_cast<std::uint64_t>(i), kForNormals),
                 values + i * kNormals);
    }
    if (at >= 0) {
      store_floats(out + at, numel - at, values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (at + i >= 0 && at + i < numel) out[at + i] = from_float<T>(values[i]);
    }
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    round_stochastic_kernel(const float* x, bfloat16* out, std::int64_t numel, std::uint64_t seed,
                            std::uint64_t first) {
  const std::int64_t spans = ceil_divide(numel, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector;
    float values[kVector];
    load_floats(x + at, numel - at, values);
    Vector<bfloat16> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      result.entry[i] =
          stochastic_bfloat16(values[i], seed, first + static_cast<std::uint64_t>(at + i));
    }
    store_vector(out + at, result, numel - at);
  }
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_rademacher(void* out, int dtype, std::int64_t numel, std::uint64_t key, void* stream) {
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(rademacher_kernel<T>, blocks_for(ceil_divide(numel, kWarpSpan)), kThreads, stream,
                  static_cast<T*>(out), numel, key);
  });
}

int lowrank_gaussian(void* out, int dtype, std::int64_t numel, std::uint64_t key,
                     const std::int64_t* device_key, std::uint64_t first, void* stream) {
  const std::int64_t spans = ceil_divide(numel + kNormals - 1, kWarpSpan);
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(gaussian_kernel<T>, numel == 0 ? 0 : blocks_for(spans), kThreads, stream,
                  static_cast<T*>(out), numel, key, device_key, first);
  });
}

int lowrank_stochastic_bfloat16(const float* x, std::uint16_t* out, std::int64_t numel,
                                std::uint64_t seed, std::uint64_t first, void* stream) {
  return launch(round_stochastic_kernel, blocks_for(ceil_divide(numel, kWarpSpan)), kThreads,
                stream, x, reinterpret_cast<bfloat16*>(out), numel, seed, first);
}
