// What the lanes of a warp do together: eight entries each, read and written as vectors.
#pragma once

#include "../core/common.h"
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

// Of the same value in all lanes.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = max_or_nan(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  }
  return x;
}

__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = min_or_nan(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  }
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  }
  return x;
}

template <typename T>
struct alignas(sizeof(T) * kVector > 16 ? 16 : sizeof(T) * kVector) Vector {
  T entry[kVector];
};

template <typename T>
__device__ __forceinline__ bool aligned(const T* data) {
  return reinterpret_cast<std::uintptr_t>(data) % alignof(Vector<T>) == 0;
}

// Up to eight entries; those beyond `count` are zero.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* data, std::int64_t count) {
  if (count >= kVector && aligned(data)) return *reinterpret_cast<const Vector<T>*>(data);
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.entry[i] = i < count ? data[i] : T{};
  return result;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* data, const Vector<T>& vector, std::int64_t count) {
  if (count >= kVector && aligned(data)) {
    *reinterpret_cast<Vector<T>*>(data) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) data[i] = vector.entry[i];
  }
}

template <typename T>
__device__ __forceinline__ void load_floats(const T* data, std::int64_t count,
                                            float (&values)[kVector]) {
  const Vector<T> loaded = load_vector(data, count);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = to_float(loaded.entry[i]);
}

template <typename T>
__device__ __forceinline__ void store_floats(T* data, std::int64_t count,
                                             const float (&values)[kVector]) {
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.entry[i] = from_float<T>(values[i]);
  store_vector(data, result, count);
}

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
