// Quantisation in groups of 8-bit and 4-bit codes. Lanes of a warp share a group; see warp.h.
#include "../core/api.h"
#include "lists.h"
#include "packed.h"

namespace lowrank {
namespace {

// The range of a group whose first entries of this lane are `kept`.
template <typename T>
__device__ __forceinline__ Range range_of(const T* x, const Share& own, int lanes,
                                          const float (&kept)[kVector]) {
  Range range;
  range.widen(kept);
  for (std::int64_t at = own.at + kWarpSpan; at < own.stop; at += kWarpSpan) {
    float others[kVector];
    load_floats(x + at, own.stop - at, others);
    range.widen(others);
  }
  return range.over(lanes);
}

template <typename T, bool kStochastic>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_groups_kernel(const T* x, std::uint8_t* codes, void* scales, void* zeros,
                           int scale_dtype, const Sharing sharing, float levels, float share,
                           std::uint64_t seed, std::uint64_t first) {
  for (std::int64_t turn = warp_index(); turn < sharing.turns(); turn += warp_count()) {
    const Share own(sharing, turn);
    float kept[kVector];
    load_floats(x + own.at, own.stop - own.at, kept);
    const GroupParameters group =
        range_of(x, own, sharing.lanes(), kept).parameters(kAffine, levels, share, scale_dtype);
    if (own.first) {
      store(scales, scale_dtype, own.group, group.scale);
      store(zeros, scale_dtype, own.group, group.zero);
    }
    for (std::int64_t at = own.at; at < own.stop; at += kWarpSpan) {
      if (at != own.at) load_floats(x + at, own.stop - at, kept);
      Vector<std::uint8_t> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        result.entry[i] = kStochastic ? stochastic_code(kept[i], group, levels, seed,
                                                        first + static_cast<std::uint64_t>(at + i))
                                      : affine_code(kept[i], group, levels);
      }
      store_vector(codes + at, result, own.stop - at);
    }
  }
}

// Quantised tensors whose entries lanes share.
template <int kMost>
struct Quantized : Blocks<kMost> {
  const std::uint8_t* codes[kMost];
  const void* scales[kMost];
  const void* zeros[kMost];  // null in the symmetric formats
  void* outs[kMost];
  std::int64_t numels[kMost];
};

constexpr int kTurnsAWarp = 4;  // that a warp takes of one tensor of a list

// Calls f(share) with what a lane has of a list's tensor.
template <typename F>
__device__ __forceinline__ void for_turns(const Sharing& sharing, std::int64_t block, const F& f) {
  for (int i = 0; i < kTurnsAWarp; ++i) {
    const std::int64_t turn = (block * kTurnsAWarp + i) * kWarps + threadIdx.x / kLanes;
    if (turn < sharing.turns()) f(Share(sharing, turn));
  }
}

inline std::int64_t blocks_of_list(std::int64_t numel, std::int64_t group) {
  return ceil_divide(Sharing(numel, group).turns(), kTurnsAWarp * kWarps);
}

template <typename T>
__device__ __forceinline__ void dequantize_share(const std::uint8_t* codes, const void* scales,
                                                 const void* zeros, int scale_dtype, T* out,
                                                 const Share& own) {
  const GroupParameters group{load(scales, scale_dtype, own.group),
                              load(zeros, scale_dtype, own.group)};
  for (std::int64_t at = own.at; at < own.stop; at += kWarpSpan) {
    const Vector<std::uint8_t> loaded = load_vector(codes + at, own.stop - at);
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = value_of(loaded.entry[i], group, kAffine, nullptr);
    }
    store_floats(out + at, own.stop - at, values);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_groups_kernel(const std::uint8_t* codes, const void* scales, const void* zeros,
                             int scale_dtype, T* out, const Sharing sharing) {
  for (std::int64_t turn = warp_index(); turn < sharing.turns(); turn += warp_count()) {
    dequantize_share(codes, scales, zeros, scale_dtype, out, Share(sharing, turn));
  }
}

template <typename T, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_groups_list_kernel(const Quantized<kMost> __grid_constant__ list, int scale_dtype,
                                  std::int64_t group) {
  const Place place = place_of(list, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  for_turns(Sharing(list.numels[t], group), place.block, [&](const Share& own) {
    dequantize_share(list.codes[t], list.scales[t], list.zeros[t], scale_dtype,
                     static_cast<T*>(list.outs[t]), own);
  });
}

template <int kFormat>
__device__ __forceinline__ std::uint32_t int4_code(float x, GroupParameters group,
                                                   const float* midpoints) {
  if constexpr (kFormat == kAffine) return affine_code(x, group, 15.0f);
  if constexpr (kFormat == kMidrise) return midrise_code(x, group);
  if constexpr (kFormat == kNf4) return nf4_code_bisected(x, group, midpoints);
}

template <typename T, int kFormat>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_int4_kernel(const T* x, std::uint8_t* codes, void* scales, void* zeros,
                         int scale_dtype, const Sharing sharing, float share, const float* nf4) {
  __shared__ float midpoints[kMidpoints + 1];
  if (kFormat == kNf4) {
    if (threadIdx.x < kMidpoints) {
      midpoints[threadIdx.x] = midpoint(nf4, static_cast<int>(threadIdx.x));
    }
    __syncthreads();
  }
  for (std::int64_t turn = warp_index(); turn < sharing.turns(); turn += warp_count()) {
    const Share own(sharing, turn);
    float kept[kVector];
    load_floats(x + own.at, own.stop - own.at, kept);
    const GroupParameters group =
        range_of(x, own, sharing.lanes(), kept).parameters(kFormat, 15.0f, share, scale_dtype);
    if (own.first) {
      store(scales, scale_dtype, own.group, group.scale);
      if (kFormat == kAffine) store(zeros, scale_dtype, own.group, group.zero);
    }
    for (std::int64_t at = own.at; at < own.stop; at += kWarpSpan) {
      if (at != own.at) load_floats(x + at, own.stop - at, kept);
      std::uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const std::uint32_t code = int4_code<kFormat>(kept[i], group, midpoints);
        if (at + i < own.stop) packed |= code << (4 * i);
      }
      store_codes(codes, at, own.stop - at, packed);
    }
  }
}

template <int kFormat, typename T>
__device__ __forceinline__ void dequantize_int4_share(const std::uint8_t* codes, const void* scales,
                                                      const void* zeros, int scale_dtype, T* out,
                                                      const float* values, const Share& own) {
  const GroupParameters group{load(scales, scale_dtype, own.group),
                              kFormat == kAffine ? load(zeros, scale_dtype, own.group) : 0.0f};
  for (std::int64_t at = own.at; at < own.stop; at += kWarpSpan) {
    const std::uint32_t packed = load_codes(codes, at, own.stop - at);
    float dense[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const std::uint8_t code = static_cast<std::uint8_t>((packed >> (4 * i)) & 15u);
      dense[i] = value_of(code, group, kFormat, values);
    }
    store_floats(out + at, own.stop - at, dense);
  }
}

template <typename T, int kFormat>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_int4_kernel(const std::uint8_t* codes, const void* scales, const void* zeros,
                           int scale_dtype, T* out, const Sharing sharing, const float* nf4) {
  __shared__ float values[kMidpoints + 1];
  if (kFormat == kNf4) {
    stage(values, nf4, kMidpoints + 1);
    __syncthreads();
  }
  for (std::int64_t turn = warp_index(); turn < sharing.turns(); turn += warp_count()) {
    dequantize_int4_share<kFormat>(codes, scales, zeros, scale_dtype, out, values,
                                   Share(sharing, turn));
  }
}

template <typename T, int kFormat, int kMost>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_int4_list_kernel(const Quantized<kMost> __grid_constant__ list, int scale_dtype,
                                std::int64_t group, const float* nf4) {
  __shared__ float values[kMidpoints + 1];
  if (kFormat == kNf4) {
    stage(values, nf4, kMidpoints + 1);
    __syncthreads();
  }
  const Place place = place_of(list, static_cast<int>(blockIdx.x));
  const int t = place.tensor;
  for_turns(Sharing(list.numels[t], group), place.block, [&](const Share& own) {
    dequantize_int4_share<kFormat>(list.codes[t], list.scales[t], list.zeros[t], scale_dtype,
                                   static_cast<T*>(list.outs[t]), values, own);
  });
}

// What `in_batches` asks for each quantised tensor of a list.
auto description(const std::uint8_t* const* codes, const void* const* scales,
                 const void* const* zeros, void* const* outs, const std::int64_t* numels,
                 std::int64_t group) {
  return [=](auto& list, int i, int t) {
    list.codes[i] = codes[t];
    list.scales[i] = scales[t];
    list.zeros[i] = zeros == nullptr ? nullptr : zeros[t];
    list.outs[i] = outs[t];
    list.numels[i] = numels[t];
    return blocks_of_list(numels[t], group);
  };
}

template <int kFormat>
struct Of {};

// Calls f(Of<format>).
template <typename F>
int dispatch_format(int format, const F& f) {
  if (format == kAffine) return f(Of<kAffine>());
  if (format == kMidrise) return f(Of<kMidrise>());
  if (format == kNf4) return f(Of<kNf4>());
  return 1;  // cudaErrorInvalidValue
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

int lowrank_quantize_groups(const void* x, int dtype, std::uint8_t* codes, void* scales,
                            void* zeros, int scale_dtype, std::int64_t numel, std::int64_t group,
                            int levels, int stochastic, std::uint64_t seed, std::uint64_t first,
                            void* stream) {
  const Sharing sharing(numel, group);
  return dispatch(dtype, [&]<typename T>(T*) {
    const auto kernel =
        stochastic != 0 ? quantize_groups_kernel<T, true> : quantize_groups_kernel<T, false>;
    return launch(kernel, blocks_for(sharing.turns()), kThreads, stream, static_cast<const T*>(x),
                  codes, scales, zeros, scale_dtype, sharing, static_cast<float>(levels),
                  1.0f / static_cast<float>(levels), seed, first);
  });
}

int lowrank_dequantize_groups(const std::uint8_t* codes, const void* scales, const void* zeros,
                              int scale_dtype, void* out, int dtype, std::int64_t numel,
                              std::int64_t group, void* stream) {
  const Sharing sharing(numel, group);
  return dispatch(dtype, [&]<typename T>(T*) {
    return launch(dequantize_groups_kernel<T>, blocks_for(sharing.turns()), kThreads, stream, codes,
                  scales, zeros, scale_dtype, static_cast<T*>(out), sharing);
  });
}

int lowrank_quantize_int4(const void* x, int dtype, std::uint8_t* codes, void* scales, void* zeros,
                          int scale_dtype, std::int64_t numel, std::int64_t group, int format,
                          float share, const float* values, void* stream) {
  if (group % 2 != 0) return 1;
  const Sharing sharing(numel, group);
  return dispatch(dtype, [&]<typename T>(T*) {
    return dispatch_format(format, [&]<int kFormat>(Of<kFormat>) {
      return launch(quantize_int4_kernel<T, kFormat>, blocks_for(sharing.turns()), kThreads, stream,
                    static_cast<const T*>(x), codes, scales, zeros, scale_dtype, sharing, share,
                    values);
    });
  });
}

int lowrank_dequantize_int4(const std::uint8_t* codes, const void* scales, const void* zeros,
                            int scale_dtype, void* out, int dtype, std::int64_t numel,
                            std::int64_t group, int format, const float* values, void* stream) {
  if (group % 2 != 0) return 1;
  const Sharing sharing(numel, group);
  return dispatch(dtype, [&]<typename T>(T*) {
    return dispatch_format(format, [&]<int kFormat>(Of<kFormat>) {
      return launch(dequantize_int4_kernel<T, kFormat>, blocks_for(sharing.turns()), kThreads,
                    stream, codes, scales, zeros, scale_dtype, static_cast<T*>(out), sharing,
                    values);
    });
  });
}

int lowrank_dequantize_groups_list(int count, const std::uint8_t* const* codes,
                                   const void* const* scales, const void* const* zeros,
                                   int scale_dtype, void* const* outs, const std::int64_t* numels,
                                   int dtype, std::int64_t group, void* stream) {
  return dispatch(dtype, [&]<typename T>(T*) {
    const auto start = [&]<int kMost>(const Quantized<kMost>& list, int blocks, int) {
      return launch(dequantize_groups_list_kernel<T, kMost>, blocks, kThreads, stream, list,
                    scale_dtype, group);
    };
    return in_batches<Quantized>(count, description(codes, scales, zeros, outs, numels, group),
                                 start);
  });
}

int lowrank_dequantize_int4_list(int count, const std::uint8_t* const* codes,
                                 const void* const* scales, const void* const* zeros,
                                 int scale_dtype, void* const* outs, const std::int64_t* numels,
                                 int dtype, std::int64_t group, int format, const float* values,
                                 void* stream) {
  if (group % 2 != 0) return 1;
  return dispatch(dtype, [&]<typename T>(T*) {
    return dispatch_format(format, [&]<int kFormat>(Of<kFormat>) {
      const auto start = [&]<int kMost>(const Quantized<kMost>& list, int blocks, int) {
        return launch(dequantize_int4_list_kernel<T, kFormat, kMost>, blocks, kThreads, stream,
                      list, scale_dtype, group, values);
      };
      return in_batches<Quantized>(count, description(codes, scales, zeros, outs, numels, group),
                                   start);
    });
  });
}
