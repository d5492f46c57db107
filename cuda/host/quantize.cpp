// Quantisers on the host: block-wise 8-bit, groups of 8-bit and 4-bit codes.
#include "../core/api.h"
#include "../core/blockwise.h"
#include "../core/groups.h"
#include "packed.h"
#include "parallel.h"

using namespace lowrank;

namespace {

template <typename T>
GroupParameters parameters_of(const T* x, std::int64_t length, int format, float levels,
                              float share, int scale_dtype) {
  std::int32_t low = 0, high = 0;  // keys of 0, which is in every range
  for (std::int64_t i = 0; i < length; ++i) {
    const std::int32_t key = order_key(to_float(x[i]));
    low = std::min(low, key);
    high = std::max(high, key);
  }
  return group_parameters(from_order_key(low), from_order_key(high), format, levels, share,
                          scale_dtype);
}

// Loops over one block or group. Codes are bytes, which may alias everything: hence __restrict__.

template <typename T>
void dynamic_codes(const T* __restrict__ x, std::int64_t length, float factor,
                   const std::int32_t* __restrict__ table, int zero,
                   std::uint8_t* __restrict__ codes) {
  for (std::int64_t i = 0; i < length; ++i) {
    codes[i] = dynamic_code(to_float(x[i]) * factor, table, zero);
  }
}

template <typename T>
void affine_codes(const T* __restrict__ x, std::int64_t length, GroupParameters own, float levels,
                  std::uint8_t* __restrict__ codes) {
  for (std::int64_t i = 0; i < length; ++i) codes[i] = affine_code(to_float(x[i]), own, levels);
}

template <typename T>
void stochastic_codes(const T* __restrict__ x, std::int64_t length, GroupParameters own,
                      float levels, std::uint64_t seed, std::uint64_t first,
                      std::uint8_t* __restrict__ codes) {
  for (std::int64_t i = 0; i < length; ++i) {
    codes[i] =
        stochastic_code(to_float(x[i]), own, levels, seed, first + static_cast<std::uint64_t>(i));
  }
}

template <typename T>
void int4_codes(const T* __restrict__ x, std::int64_t length, GroupParameters own, int format,
                const float* __restrict__ midpoints, std::uint8_t* __restrict__ codes) {
  if (format == kAffine) return affine_codes(x, length, own, 15.0f, codes);
  if (format == kMidrise) {
    for (std::int64_t i = 0; i < length; ++i) codes[i] = midrise_code(to_float(x[i]), own);
    return;
  }
  for (std::int64_t i = 0; i < length; ++i) codes[i] = nf4_code(to_float(x[i]), own, midpoints);
}

template <typename T>
void values_of(const std::uint8_t* __restrict__ codes, std::int64_t length, GroupParameters own,
               int format, const float* __restrict__ nf4, T* __restrict__ out) {
  for (std::int64_t i = 0; i < length; ++i) {
    out[i] = from_float<T>(value_of(codes[i], own, format, nf4));
  }
}

GroupParameters load_parameters(const void* scales, const void* zeros, int dtype, std::int64_t g) {
  return {load(scales, dtype, g), zeros == nullptr ? 0.0f : load(zeros, dtype, g)};
}

void store_parameters(void* scales, void* zeros, int dtype, std::int64_t g, GroupParameters group) {
  store(scales, dtype, g, group.scale);
  if (zeros != nullptr) store(zeros, dtype, g, group.zero);
}

}  // namespace

int lowrank_quantize_blockwise(const void* x, int dtype, std::uint8_t* codes, float* absmax,
                               std::int64_t numel, std::int64_t block, const std::int32_t* table,
                               int zero, void*) {
  return dispatch(dtype, [&]<typename T>(T*) {
    const T* values = static_cast<const T*>(x);
    parallel_for(
        ceil_divide(numel, block), block, kRounded, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t b = begin; b < end; ++b) {
            const std::int64_t start = b * block, stop = std::min(start + block, numel);
            std::uint32_t magnitude = 0;
            for (std::int64_t i = start; i < stop; ++i) {
              magnitude = std::max(magnitude, bits_of(to_float(values[i])) & 0x7FFFFFFFu);
            }
            const float largest = float_of(magnitude);
            absmax[b] = largest;
            const float factor = reciprocal(largest);
            dynamic_codes(values + start, stop - start, factor, table, zero, codes + start);
          }
        });
    return 0;
  });
}

int lowrank_dequantize_blockwise(const std::uint8_t* codes, const float* absmax, void* out,
                                 int dtype, std::int64_t numel, std::int64_t block,
                                 const float* map, void*) {
  return dispatch(dtype, [&]<typename T>(T*) {
    T* values = static_cast<T*>(out);
    parallel_for(ceil_divide(numel, block), block, kCopied,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t b = begin; b < end; ++b) {
                     const std::int64_t start = b * block, stop = std::min(start + block, numel);
                     for (std::int64_t i = start; i < stop; ++i) {
                       values[i] = from_float<T>(map[codes[i]] * absmax[b]);
                     }
                   }
                 });
    return 0;
  });
}

int lowrank_quantize_groups(const void* x, int dtype, std::uint8_t* codes, void* scales,
                            void* zeros, int scale_dtype, std::int64_t numel, std::int64_t group,
                            int levels, int stochastic, std::uint64_t seed, std::uint64_t first,
                            void*) {
  return dispatch(dtype, [&]<typename T>(T*) {
    const T* values = static_cast<const T*>(x);
    const float top = static_cast<float>(levels), share = 1.0f / top;
    parallel_for(
        ceil_divide(numel, group), group, kRounded, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t g = begin; g < end; ++g) {
            const std::int64_t start = g * group, stop = std::min(start + group, numel);
            const GroupParameters own =
                parameters_of(values + start, stop - start, kAffine, top, share, scale_dtype);
            store_parameters(scales, zeros, scale_dtype, g, own);
            if (stochastic) {
              stochastic_codes(values + start, stop - start, own, top, seed,
                               first + static_cast<std::uint64_t>(start), codes + start);
            } else {
              affine_codes(values + start, stop - start, own, top, codes + start);
            }
          }
        });
    return 0;
  });
}

int lowrank_dequantize_groups(const std::uint8_t* codes, const void* scales, const void* zeros,
                              int scale_dtype, void* out, int dtype, std::int64_t numel,
                              std::int64_t group, void*) {
  return dispatch(dtype, [&]<typename T>(T*) {
    T* values = static_cast<T*>(out);
    parallel_for(ceil_divide(numel, group), group, kCopied,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t g = begin; g < end; ++g) {
                     const std::int64_t start = g * group, stop = std::min(start + group, numel);
                     const GroupParameters own = load_parameters(scales, zeros, scale_dtype, g);
                     values_of(codes + start, stop - start, own, kAffine, nullptr, values + start);
                   }
                 });
    return 0;
  });
}

int lowrank_quantize_int4(const void* x, int dtype, std::uint8_t* codes, void* scales, void* zeros,
                          int scale_dtype, std::int64_t numel, std::int64_t group, int format,
                          float share, const float* nf4, void*) {
  if (group % 2 != 0) return 1;
  const Cost cost = format == kNf4 ? kComputed : kRounded;
  return dispatch(dtype, [&]<typename T>(T*) {
    const T* values = static_cast<const T*>(x);
    parallel_for(ceil_divide(numel, group), group, cost, [&](std::int64_t begin, std::int64_t end) {
      std::vector<std::uint8_t> fresh(static_cast<std::size_t>(group));
      float midpoints[kMidpoints] = {};
      for (int i = 0; format == kNf4 && i < kMidpoints; ++i) midpoints[i] = midpoint(nf4, i);
      for (std::int64_t g = begin; g < end; ++g) {
        const std::int64_t start = g * group, stop = std::min(start + group, numel);
        const GroupParameters own =
            parameters_of(values + start, stop - start, format, 15.0f, share, scale_dtype);
        store_parameters(scales, zeros, scale_dtype, g, own);
        int4_codes(values + start, stop - start, own, format, midpoints, fresh.data());
        pack(fresh.data(), stop - start, codes + start / 2);
      }
    });
    return 0;
  });
}

int lowrank_dequantize_int4(const std::uint8_t* codes, const void* scales, const void* zeros,
                            int scale_dtype, void* out, int dtype, std::int64_t numel,
                            std::int64_t group, int format, const float* nf4, void*) {
  if (group % 2 != 0) return 1;
  return dispatch(dtype, [&]<typename T>(T*) {
    T* values = static_cast<T*>(out);
    parallel_for(ceil_divide(numel, group), group, kCopied,
                 [&](std::int64_t begin, std::int64_t end) {
                   std::vector<std::uint8_t> fresh(static_cast<std::size_t>(group));
                   for (std::int64_t g = begin; g < end; ++g) {
                     const std::int64_t start = g * group, stop = std::min(start + group, numel);
                     const GroupParameters own = load_parameters(scales, zeros, scale_dtype, g);
                     unpack(codes + start / 2, stop - start, fresh.data());
                     values_of(fresh.data(), stop - start, own, format, nf4, values + start);
                   }
                 });
    return 0;
  });
}

int lowrank_dequantize_groups_list(int count, const std::uint8_t* const* codes,
                                   const void* const* scales, const void* const* zeros,
                                   int scale_dtype, void* const* outs, const std::int64_t* numels,
                                   int dtype, std::int64_t group, void* stream) {
  for (int t = 0; t < count; ++t) {
    const int error = lowrank_dequantize_groups(codes[t], scales[t], zeros[t], scale_dtype, outs[t],
                                                dtype, numels[t], group, stream);
    if (error != 0) return error;
  }
  return 0;
}

int lowrank_dequantize_int4_list(int count, const std::uint8_t* const* codes,
                                 const void* const* scales, const void* const* zeros,
                                 int scale_dtype, void* const* outs, const std::int64_t* numels,
                                 int dtype, std::int64_t group, int format, const float* values,
                                 void* stream) {
  for (int t = 0; t < count; ++t) {
    const int error = lowrank_dequantize_int4(
        codes[t], scales[t], zeros == nullptr ? nullptr : zeros[t], scale_dtype, outs[t], dtype,
        numels[t], group, format, values, stream);
    if (error != 0) return error;
  }
  return 0;
}
