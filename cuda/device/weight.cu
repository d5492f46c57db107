// Writing an update into a weight, one pass over it: dense, or in eight or four bits.
#include <type_traits>

#include "../core/api.h"
#include "../core/int4_update.h"
#include "../core/weight.h"
#include "lists.h"
#include "packed.h"

namespace lowrank {
namespace {

// An array that entries are read from: of a type, missing, or of a type that is only known when it
// runs (a null pointer is missing).
struct Missing {};
struct AnyType {};

template <typename T>
struct Source {
  const T* data;
  __device__ __forceinline__ bool there() const { return true; }
  __device__ __forceinline__ void load(std::int64_t at, std::int64_t count,
                                       float (&values)[kVector]) const {
    load_floats(data + at, count, values);
  }
};

template <>
struct Source<Missing> {
  __device__ __forceinline__ bool there() const { return false; }
  __device__ __forceinline__ void load(std::int64_t, std::int64_t, float (&)[kVector]) const {}
};

template <>
struct Source<AnyType> {
  const void* data;
  int dtype;
  __device__ __forceinline__ bool there() const { return data != nullptr; }
  __device__ __forceinline__ void load(std::int64_t at, std::int64_t count,
                                       float (&values)[kVector]) const {
    load_floats(data, dtype, at, count, values);
  }
};

// What is taken off each entry, besides decay; see core/api.h. Positions within the tensor are `I`.
template <typename D, typename G, typename I>
struct Update {
  using Position = I;
  Source<D> delta;
  Source<G> grad;
  const float* factors;
  I row_stride;
  I column_stride;
  I columns;
  WriteSizes write;
};

// Eight consecutive entries from flat position `at` on.
template <typename U>
__device__ __forceinline__ void apply(const U& update, const WriteBack& write, std::int64_t at,
                                      std::int64_t count, float (&values)[kVector]) {
  using I = typename U::Position;
  // One array after the other, for the sake of registers.
  float entries[kVector] = {};
  if (update.delta.there()) update.delta.load(at, count, entries);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = written(values[i], entries[i], 0.0f, write);
  }
  if (!update.grad.there()) return;
  update.grad.load(at, count, entries);
  I row = static_cast<I>(at) / update.columns;
  I column = static_cast<I>(at) - row * update.columns;
  const float* factor = update.factors + row * update.row_stride + column * update.column_stride;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    // As `scaled` of core/weight.h, in fewer registers.
    if (i < count && *factor != 0.0f) values[i] -= entries[i] * *factor;
    factor += update.column_stride;
    if (++column == update.columns) {
      column = 0;
      factor = update.factors + ++row * update.row_stride;
    }
  }
}

template <typename T, typename U>
__global__ void __launch_bounds__(kThreads, kResident)
    write_kernel(T* weight, const U update, std::int64_t numel) {
  const WriteBack write = update.write.read();
  const std::int64_t spans = ceil_divide(numel, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector;
    if (at >= numel) continue;
    float values[kVector];
    load_floats(weight + at, numel - at, values);
    apply(update, write, at, numel - at, values);
    store_floats(weight + at, numel - at, values);
  }
}

// Weights of one shape, their gradients and the factors of these.
template <int kMost>
struct Weights : Blocks<kMost> {
  void* weights[kMost];
  const void* grads[kMost];
  const float* factors[kMost];
};

constexpr std::int64_t kWeightEntries = kThreads * kVector * 4;  // of a block

// `update` lacks their addresses.
template <typename T, typename U, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    write_list_kernel(const Weights<kMost> __grid_constant__ list, U update, std::int64_t numel) {
  const Place place = place_of(list, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  update.grad.data = static_cast<const T*>(list.grads[t]);
  update.factors = list.factors[t];
  T* weight = static_cast<T*>(list.weights[t]);
  const WriteBack write = update.write.given;
  const std::int64_t start = place.block * kWeightEntries;
  const std::int64_t stop = start + kWeightEntries < numel ? start + kWeightEntries : numel;
  for (std::int64_t at = start + threadIdx.x * kVector; at < stop; at += kThreads * kVector) {
    float values[kVector];
    load_floats(weight + at, stop - at, values);
    apply(update, write, at, stop - at, values);
    store_floats(weight + at, stop - at, values);
  }
}

template <typename U>
__global__ void __launch_bounds__(kThreads, kResident)
    write_stochastic_kernel(bfloat16* weight, const U update, std::int64_t numel,
                            std::uint64_t seed, const std::int64_t* device_seed,
                            std::uint64_t first) {
  if (device_seed != nullptr) seed = static_cast<std::uint64_t>(*device_seed);
  const WriteBack write = update.write.read();
  const std::int64_t spans = ceil_divide(numel, kWarpSpan);
  for (std::int64_t span = warp_index(); span < spans; span += warp_count()) {
    const std::int64_t at = span * kWarpSpan + lane_index() * kVector;
    if (at >= numel) continue;
    float values[kVector];
    load_floats(weight + at, numel - at, values);
    apply(update, write, at, numel - at, values);
    Vector<bfloat16> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      result.entry[i] =
          stochastic_bfloat16(values[i], seed, first + static_cast<std::uint64_t>(at + i));
    }
    store_vector(weight + at, result, numel - at);
  }
}

// Eight codes of a quantised weight, and what they stand for.
struct Bytes {
  GroupParameters group;
  Vector<std::uint8_t> loaded;

  __device__ __forceinline__ void load(const std::uint8_t* codes, std::int64_t at,
                                       std::int64_t count) {
    loaded = load_vector(codes + at, count);
  }
  __device__ __forceinline__ float value(int i) const {
    return value_of(loaded.entry[i], group, kAffine, nullptr);
  }
};

struct Packed {
  float scale;
  std::uint32_t loaded;

  __device__ __forceinline__ void load(const std::uint8_t* codes, std::int64_t at,
                                       std::int64_t count) {
    loaded = load_codes(codes, at, count);
  }
  __device__ __forceinline__ float value(int i) const {
    const std::uint8_t code = static_cast<std::uint8_t>((loaded >> (4 * i)) & 15u);
    return value_of(code, {scale, 0.0f}, kMidrise, nullptr);
  }
};

// Eight entries of a quantised weight after the update; whether one changed.
template <typename Codes, typename U>
__device__ __forceinline__ bool updated(const std::uint8_t* codes, Codes old, const U& update,
                                        const WriteBack& write, std::int64_t at, std::int64_t stop,
                                        float (&values)[kVector]) {
  old.load(codes, at, stop - at);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = old.value(i);
  apply(update, write, at, stop - at, values);
  bool changed = false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float before = old.value(i);
    if (at + i >= stop) values[i] = 0.0f;
    changed = changed || (at + i < stop && values[i] != before);
  }
  return changed;
}

// Updates without known types, and those without a delta, which are rare, need more registers.
template <typename D, typename G, typename I>
constexpr int resident(const Update<D, G, I>&) {
  constexpr bool kUsual = !std::is_same_v<D, AnyType> && !std::is_same_v<D, Missing>;
  return kUsual ? kResident : kResident / 2;
}

// Lanes share a group, see warp.h; groups of more than 256 entries are computed twice.
template <typename U>
__global__ void __launch_bounds__(kThreads, resident(U{}))
    write_int8_kernel(std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                      const U update, const Sharing sharing, std::uint64_t seed,
                      const std::int64_t* device_seed, std::uint64_t first) {
  if (device_seed != nullptr) seed = static_cast<std::uint64_t>(*device_seed);
  const WriteBack write = update.write.read();
  for (std::int64_t turn = warp_index(); turn < sharing.turns(); turn += warp_count()) {
    const Share own(sharing, turn);
    const Bytes old{{load(scales, scale_dtype, own.group), load(zeros, scale_dtype, own.group)},
                    {}};
    float kept[kVector];
    Range range;
    bool changed = updated(codes, old, update, write, own.at, own.stop, kept);
    range.widen(kept);
    for (std::int64_t at = own.at + kWarpSpan; at < own.stop; at += kWarpSpan) {
      float others[kVector];
      changed = updated(codes, old, update, write, at, own.stop, others) || changed;
      range.widen(others);
    }
    const int lanes = sharing.lanes();
    if (lanes_max(changed ? 1 : 0) == 0) continue;  // nothing in the whole warp
    changed = lanes_max(changed ? 1 : 0, lanes) != 0;
    const GroupParameters fresh =
        range.over(lanes).parameters(kAffine, 255.0f, 1.0f / 255.0f, scale_dtype);
    if (own.first && changed) {
      store(scales, scale_dtype, own.group, fresh.scale);
      store(zeros, scale_dtype, own.group, fresh.zero);
    }
    for (std::int64_t at = own.at; changed && at < own.stop; at += kWarpSpan) {
      if (at != own.at) updated(codes, old, update, write, at, own.stop, kept);
      Vector<std::uint8_t> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        result.entry[i] = stochastic_code(kept[i], fresh, 255.0f, seed,
                                          first + static_cast<std::uint64_t>(at + i));
      }
      store_vector(codes + at, result, own.stop - at);
    }
  }
}

// The same in four bits, where most groups keep their scale.
template <typename U>
__global__ void __launch_bounds__(kThreads, resident(U{}))
    write_int4_kernel(std::uint8_t* codes, void* scales, int scale_dtype, const U update,
                      const Sharing sharing, std::uint64_t seed, std::uint64_t first,
                      std::int64_t steps, const std::int64_t* device_steps) {
  const std::uint32_t moved = turned(device_steps == nullptr ? steps : *device_steps);
  const WriteBack write = update.write.read();
  for (std::int64_t turn = warp_index(); turn < sharing.turns(); turn += warp_count()) {
    const Share own(sharing, turn);
    const Packed old{load(scales, scale_dtype, own.group), 0};
    float kept[kVector];
    bool changed = updated(codes, old, update, write, own.at, own.stop, kept);
    std::int32_t most = magnitude(0, kept);
    for (std::int64_t at = own.at + kWarpSpan; at < own.stop; at += kWarpSpan) {
      float others[kVector];
      changed = updated(codes, old, update, write, at, own.stop, others) || changed;
      most = magnitude(most, others);
    }
    const int lanes = sharing.lanes();
    if (lanes_max(changed ? 1 : 0) == 0) continue;  // nothing in the whole warp
    changed = lanes_max(changed ? 1 : 0, lanes) != 0;
    const float largest = float_of(static_cast<std::uint32_t>(lanes_max(most, lanes)));
    const float scale = fitting_scale(largest, old.scale, scale_dtype);
    if (own.first && changed) store(scales, scale_dtype, own.group, scale);
    for (std::int64_t at = own.at; changed && at < own.stop; at += kWarpSpan) {
      if (at != own.at) updated(codes, old, update, write, at, own.stop, kept);
      std::uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float noise = spread_uniform(seed, first + static_cast<std::uint64_t>(at + i), moved);
        const std::uint32_t code = spread_code(kept[i], scale, noise);
        if (at + i < own.stop) packed |= code << (4 * i);
      }
      store_codes(codes, at, own.stop - at, packed);
    }
  }
}

// An update as it is given.
struct Given {
  const void* delta;
  int delta_dtype;
  const void* grad;
  int grad_dtype;
  const float* factors;
  std::int64_t row_stride, column_stride, rows, columns;
  WriteSizes write;

  template <typename D, typename G>
  auto typed() const {
    using I = std::uint32_t;
    return Update<D, G, I>{source<D>(delta, delta_dtype),
                           source<G>(grad, grad_dtype),
                           factors,
                           static_cast<I>(row_stride),
                           static_cast<I>(column_stride),
                           static_cast<I>(columns),
                           write};
  }

  auto untyped() const {
    return Update<AnyType, AnyType, std::int64_t>{{delta, delta_dtype},
                                                  {grad, grad_dtype},
                                                  factors,
                                                  row_stride,
                                                  column_stride,
                                                  columns,
                                                  write};
  }

 private:
  template <typename T>
  static Source<T> source(const void* data, int) {
    if constexpr (std::is_same_v<T, Missing>) {
      return {};
    } else {
      return {static_cast<const T*>(data)};
    }
  }
};

// Calls f(update): with the types of a weight `T` in what is usual, an update as wide as fp32 or
// the weight and a gradient of the weight's precision, and else with types that are only known when
// it runs, as positions beyond 2^32 are.
template <typename T, typename F>
int dispatch_update(const Given& given, const F& f) {
  const bool small = given.rows * given.columns < (std::int64_t{1} << 31);
  if constexpr (!std::is_same_v<T, float16>) {
    constexpr int kOwn = std::is_same_v<T, float> ? kFloat32 : kBfloat16;
    const bool delta = given.delta != nullptr, grad = given.grad != nullptr;
    if (small && (!grad || given.grad_dtype == kOwn)) {
      if (delta && given.delta_dtype == kFloat32) {
        return grad ? f(given.typed<float, T>()) : f(given.typed<float, Missing>());
      }
      if (!delta && grad) return f(given.typed<Missing, T>());
      if constexpr (kOwn == kBfloat16) {
        if (delta && given.delta_dtype == kOwn) {
          return grad ? f(given.typed<T, T>()) : f(given.typed<T, Missing>());
        }
      }
    }
  }
  return f(given.untyped());
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_write_back(void* weight, int dtype, const void* delta, int delta_dtype,
                       const void* grad, int grad_dtype, const float* factors,
                       std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                       std::int64_t columns, float keep, float alpha, int stochastic,
                       std::uint64_t seed, std::uint64_t first, const float* device_sizes,
                       const std::int64_t* device_seed, void* stream) {
  const WriteSizes write{{keep, alpha}, device_sizes};
  const Given given{delta,      delta_dtype,   grad, grad_dtype, factors,
                    row_stride, column_stride, rows, columns,    write};
  const std::int64_t numel = rows * columns;
  const std::int64_t blocks = blocks_for(ceil_divide(numel, kWarpSpan));
  return dispatch(dtype, [&]<typename T>(T*) {
    return dispatch_update<T>(given, [&]<typename U>(const U& update) {
      T* entries = static_cast<T*>(weight);
      if constexpr (std::is_same_v<T, bfloat16>) {
        if (stochastic != 0) {
          return launch(write_stochastic_kernel<U>, blocks, kThreads, stream, entries, update,
                        numel, seed, device_seed, first);
        }
      }
      return launch(write_kernel<T, U>, blocks, kThreads, stream, entries, update, numel);
    });
  });
}

int lowrank_write_back_list(int count, void* const* weights, const void* const* grads,
                            const float* const* factors, int dtype, std::int64_t row_stride,
                            std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                            float keep, void* stream) {
  const std::int64_t numel = rows * columns;
  if (numel >= (std::int64_t{1} << 31)) return 1;  // cudaErrorInvalidValue
  const auto fill = [&](auto& list, int i, int t) {
    list.weights[i] = weights[t];
    list.grads[i] = grads[t];
    list.factors[i] = factors[t];
    return ceil_divide(numel, kWeightEntries);
  };
  const Given given{nullptr,    kFloat32,      nullptr, dtype,   nullptr,
                    row_stride, column_stride, rows,    columns, {{keep, 0.0f}, nullptr}};
  return dispatch(dtype, [&]<typename T>(T*) {
    const auto update = given.typed<Missing, T>();
    const auto start = [&]<int kMost>(const Weights<kMost>& list, int blocks, int) {
      return launch(write_list_kernel<T, std::remove_const_t<decltype(update)>, kMost>, blocks,
                    kThreads, stream, list, update, numel);
    };
    return in_batches<Weights>(count, fill, start);
  });
}

int lowrank_write_back_int8(std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                            const void* delta, int delta_dtype, const void* grad, int grad_dtype,
                            const float* factors, std::int64_t row_stride,
                            std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                            std::int64_t group, float keep, float alpha, std::uint64_t seed,
                            std::uint64_t first, const float* device_sizes,
                            const std::int64_t* device_seed, void* stream) {
  const WriteSizes write{{keep, alpha}, device_sizes};
  const Given given{delta,      delta_dtype,   grad, grad_dtype, factors,
                    row_stride, column_stride, rows, columns,    write};
  const Sharing sharing(rows * columns, group);
  return dispatch_update<bfloat16>(given, [&]<typename U>(const U& update) {
    return launch(write_int8_kernel<U>, blocks_for(sharing.turns()), kThreads, stream, codes,
                  scales, zeros, scale_dtype, update, sharing, seed, device_seed, first);
  });
}

int lowrank_write_back_int4(std::uint8_t* codes, void* scales, int scale_dtype, const void* delta,
                            int delta_dtype, const void* grad, int grad_dtype, const float* factors,
                            std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                            std::int64_t columns, std::int64_t group, float keep, float alpha,
                            std::uint64_t seed, std::uint64_t first, std::int64_t turn,
                            const float* device_sizes, const std::int64_t* device_turn,
                            void* stream) {
  if (group % 2 != 0) return 1;
  const WriteSizes write{{keep, alpha}, device_sizes};
  const Given given{delta,      delta_dtype,   grad, grad_dtype, factors,
                    row_stride, column_stride, rows, columns,    write};
  const Sharing sharing(rows * columns, group);
  return dispatch_update<bfloat16>(given, [&]<typename U>(const U& update) {
    return launch(write_int4_kernel<U>, blocks_for(sharing.turns()), kThreads, stream, codes,
                  scales, scale_dtype, update, sharing, seed, first, turn, device_turn);
  });
}
