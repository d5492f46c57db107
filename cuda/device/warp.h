// What the lanes of a warp do together: eight entries each, read and written as vectors.
#pragma once

#include "../core/groups.h"
#include "launch.h"

namespace lowrank {

constexpr int kVector = 8;                   // entries of a lane
constexpr int kWarpSpan = kLanes * kVector;  // entries of a warp

__device__ __forceinline__ std::int64_t warp_index() {
  return (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
}

__device__ __forceinline__ std::int64_t warp_count() {
  return static_cast<std::int64_t>(gridDim.x) * kWarps;
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kLanes); }

// The largest number that `lanes` neighbouring lanes have (a power of two), in each of them. All
// lanes of the warp take part.
__device__ __forceinline__ std::int32_t lanes_max(std::int32_t x, int lanes = kLanes) {
#if defined(LOWRANK_SIMULATOR) || __CUDA_ARCH__ >= 800
  if (lanes == kLanes) return __reduce_max_sync(0xFFFFFFFFu, x);
#endif
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const std::int32_t other = __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    x = x > other ? x : other;
  }
  return x;
}

// Smallest and largest of numbers that include 0, as order keys: integers, of which one instruction
// finds the larger. NaN lies beyond infinity on its sign's side.
struct Range {
  std::int32_t low = 0, high = 0;

  __device__ __forceinline__ void widen(const float (&values)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const std::int32_t key = order_key(values[i]);
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
  }

  // Of `lanes` neighbouring lanes.
  __device__ __forceinline__ Range over(int lanes) const {
    return {~lanes_max(~low, lanes), lanes_max(high, lanes)};
  }

  __device__ __forceinline__ GroupParameters parameters(int format, float levels, float share,
                                                        int dtype) const {
    return group_parameters(from_order_key(low), from_order_key(high), format, levels, share,
                            dtype);
  }
};

// The pattern of the largest magnitude, NaN if there is one.
__device__ __forceinline__ std::int32_t magnitude(std::int32_t largest,
                                                  const float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const std::int32_t own = static_cast<std::int32_t>(bits_of(values[i]) & 0x7FFFFFFFu);
    largest = own > largest ? own : largest;
  }
  return largest;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  }
  return x;
}

template <typename T, int N = kVector>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vector {
  T entry[N];
};

template <int N, typename T>
__device__ __forceinline__ bool aligned(const T* data) {
  return reinterpret_cast<std::uintptr_t>(data) % alignof(Vector<T, N>) == 0;
}

// Up to N entries; those beyond `count` are zero.
template <int N = kVector, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* data, std::int64_t count) {
  if (count >= N && aligned<N>(data)) return *reinterpret_cast<const Vector<T, N>*>(data);
  Vector<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.entry[i] = i < count ? data[i] : T{};
  return result;
}

template <typename T, int N>
__device__ __forceinline__ void store_vector(T* data, const Vector<T, N>& vector,
                                             std::int64_t count) {
  if (count >= N && aligned<N>(data)) {
    *reinterpret_cast<Vector<T, N>*>(data) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) data[i] = vector.entry[i];
  }
}

template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* data, std::int64_t count, float (&values)[N]) {
  const Vector<T, N> loaded = load_vector<N>(data, count);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(loaded.entry[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store_floats(T* data, std::int64_t count,
                                             const float (&values)[N]) {
  Vector<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.entry[i] = from_float<T>(values[i]);
  store_vector(data, result, count);
}

// How the groups of a tensor are shared between lanes: as many take one as there are vectors of
// eight entries in it, a power of two, so that a warp has several small groups at a time.
struct Sharing {
  std::int64_t numel, group, groups;
  int shift;  // 2^shift lanes have a group

  LR_HD Sharing(std::int64_t numel, std::int64_t group)
      : numel(numel), group(group), groups(ceil_divide(numel, group)), shift(0) {
    while (shift < 5 && (kVector << shift) < group) ++shift;
  }

  // What the warps take in turn.
  LR_HD std::int64_t turns() const { return ceil_divide(groups, kLanes >> shift); }
  LR_HD int lanes() const { return 1 << shift; }
};

// A lane's part of the groups that its warp has in one turn.
struct Share {
  std::int64_t group;     // its index
  std::int64_t at, stop;  // its first entry, and the end of the group; nothing for a lane without
  bool first;             // it reads and writes the scale

  __device__ __forceinline__ Share(const Sharing& sharing, std::int64_t turn) {
    group = turn * (kLanes >> sharing.shift) + (lane_index() >> sharing.shift);
    const int own = lane_index() & (sharing.lanes() - 1);
    const std::int64_t start = group * sharing.group;
    const bool there = group < sharing.groups;
    const std::int64_t end = start + sharing.group;
    stop = !there ? 0 : end < sharing.numel ? end : sharing.numel;
    at = there ? start + own * kVector : 0;
    first = there && own == 0;
    group = there ? group : 0;
  }
};

// Of an array whose type is only known when it runs.
__device__ __forceinline__ void load_floats(const void* data, int dtype, std::int64_t first,
                                            std::int64_t count, float (&values)[kVector]) {
  if (dtype == kFloat32) {
    load_floats(static_cast<const float*>(data) + first, count, values);
  } else if (dtype == kBfloat16) {
    load_floats(static_cast<const bfloat16*>(data) + first, count, values);
  } else {
    load_floats(static_cast<const float16*>(data) + first, count, values);
  }
}

// Copies a table into shared memory, by the whole block.
template <typename T>
__device__ __forceinline__ void stage(T* shared, const T* table, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) shared[i] = table[i];
}

}  // namespace lowrank
