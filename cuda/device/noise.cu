// Random signs and stochastic rounding.
#include "../core/api.h"
#include "../core/normal.h"
#include "lists.h"

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

// Eight numbers from counter `counter` on.
__device__ __forceinline__ void normals_from(std::uint64_t key, std::uint64_t counter,
                                             float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector / kNormals; ++i) {
    normals_of(philox(key, counter + static_cast<std::uint64_t>(i), kForNormals),
               values + i * kNormals);
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
    normals_from(key, counter, values);
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

// Tensors of normal numbers, with a key each.
template <int kMost>
struct Normals : Blocks<kMost> {
  void* outs[kMost];
  const std::int64_t* device_keys[kMost];  // null where `keys` has it
  std::uint64_t keys[kMost];
  std::int64_t numels[kMost];
};

constexpr std::int64_t kNormalEntries = kThreads * kVector * 4;  // of a block

template <typename T, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    gaussian_list_kernel(const Normals<kMost> __grid_constant__ normals, float scale) {
  const Place place = place_of(normals, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  const std::int64_t* given = normals.device_keys[t];
  const std::uint64_t key = given == nullptr ? normals.keys[t] : static_cast<std::uint64_t>(*given);
  T* out = static_cast<T*>(normals.outs[t]);
  const std::int64_t numel = normals.numels[t];
  const std::int64_t start = place.block * kNormalEntries;
  const std::int64_t stop = start + kNormalEntries < numel ? start + kNormalEntries : numel;
  for (std::int64_t at = start + threadIdx.x * kVector; at < stop; at += kThreads * kVector) {
    float values[kVector];
    normals_from(key, static_cast<std::uint64_t>(at) / kNormals, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= scale;
    store_floats(out + at, stop - at, values);
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    round_stochastic_kernel(const float* x, bfloat16* out, std::int64_t numel, std::uint64_t seed,
                            const std::int64_t* device_seed, std::uint64_t first) {
  if (device_seed != nullptr) seed = static_cast<std::uint64_t>(*device_seed);
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

// Where the step counts are.
template <int kMost>
struct Steps : Blocks<kMost> {
  const float* steps[kMost];
  std::uint64_t states[kMost];
};

template <int kMost>
__global__ void __launch_bounds__(kThreads)
    step_seeds_kernel(const Steps<kMost> __grid_constant__ list, std::uint64_t purpose,
                      std::int64_t* seeds) {
  for (int t = static_cast<int>(threadIdx.x); t < list.count; t += kThreads) {
    seeds[t] = static_cast<std::int64_t>(step_seed(list.states[t], *list.steps[t], purpose));
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

int lowrank_gaussian_list(int count, void* const* outs, const std::int64_t* numels,
                          const std::uint64_t* keys, const std::int64_t* const* device_keys,
                          int dtype, float scale, void* stream) {
  const auto fill = [&](auto& normals, int i, int t) {
    normals.outs[i] = outs[t];
    normals.device_keys[i] = device_keys == nullptr ? nullptr : device_keys[t];
    normals.keys[i] = device_keys == nullptr ? keys[t] : 0;
    normals.numels[i] = numels[t];
    return ceil_divide(numels[t], kNormalEntries);
  };
  return dispatch(dtype, [&]<typename T>(T*) {
    const auto start = [&]<int kMost>(const Normals<kMost>& normals, int blocks, int) {
      return launch(gaussian_list_kernel<T, kMost>, blocks, kThreads, stream, normals, scale);
    };
    return in_batches<Normals>(count, fill, start);
  });
}

int lowrank_step_seeds(int count, const float* const* steps, const std::uint64_t* states,
                       std::uint64_t purpose, std::int64_t* seeds, void* stream) {
  const auto fill = [&](auto& list, int i, int t) {
    list.steps[i] = steps[t];
    list.states[i] = states[t];
    return 1;
  };
  const auto start = [&]<int kMost>(const Steps<kMost>& list, int, int begin) {
    return launch(step_seeds_kernel<kMost>, 1, kThreads, stream, list, purpose, seeds + begin);
  };
  return in_batches<Steps>(count, fill, start);
}

int lowrank_stochastic_bfloat16(const float* x, std::uint16_t* out, std::int64_t numel,
                                std::uint64_t seed, std::uint64_t first,
                                const std::int64_t* device_seed, void* stream) {
  return launch(round_stochastic_kernel, blocks_for(ceil_divide(numel, kWarpSpan)), kThreads,
                stream, x, reinterpret_cast<bfloat16*>(out), numel, seed, device_seed, first);
}
