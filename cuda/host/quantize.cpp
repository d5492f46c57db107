// Quantisers on the host: block-wise 8-bit, groups of 8-bit and 4-bit codes.
#include "../core/api.h"
#include "../core/blockwise.h"
#include "../core/groups.h"
#include "parallel.h"

using namespace lowrank;

namespace {

template <typename T>
GroupParameters parameters_of(const T* x, std::int64_t length, int format, float levels,
                              float largest, int scale_dtype) {
  float low = to_float(x[0]), high = low;
  for (std::int64_t i = 1; i < length; ++i) {
    const float value = to_float(x[i]);
    low = min_or_nan(low, value);
    high = max_or_nan(high, value);
  }
  return group_parameters(low, high, format, levels, largest, scale_dtype);
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
    parallel_for(ceil_divide(numel, block), block, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        const std::int64_t start = b * block, stop = std::min(start + block, numel);
        float largest = 0.0f;
        for (std::int64_t i = start; i < stop; ++i) {
          largest = max_or_nan(std::fabs(to_float(values[i])), largest);
        }
        absmax[b] = largest;
        const float divisor = block_divisor(largest);
        for (std::int64_t i = start; i < stop; ++i) {
          codes[i] = dynamic_code(to_float(values[i]) / divisor, table, zero);
        }
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
    parallel_for(ceil_divide(numel, block), block, [&](std::int64_t begin, std::int64_t end) {
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
    const float top = static_cast<float>(levels);
    parallel_for(ceil_divide(numel, group), group, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t g = begin; g < end; ++g) {
        const std::int64_t start = g * group, stop = std::min(start + group, numel);
        const GroupParameters own =
            parameters_of(values + start, stop - start, kAffine, top, 1.0f, scale_dtype);
        store_parameters(scales, zeros, scale_dtype, g, own);
        for (std::int64_t i = start; i < stop; ++i) {
          const float value = to_float(values[i]);
          codes[i] = stochastic ? stochastic_code(value, own, top, seed,
                                                  first + static_cast<std::uint64_t>(i))
                                : affine_code(value, own, top);
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
    parallel_for(ceil_divide(numel, group), group, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t g = begin; g < end; ++g) {
        const std::int64_t start = g * group, stop = std::min(start + group, numel);
        const GroupParameters own = load_parameters(scales, zeros, scale_dtype, g);
        for (std::int64_t i = start; i < stop; ++i) {
          values[i] = from_float<T>(value_of(codes[i], own, kAffine, nullptr));
        }
      }
    });
    return 0;
  });
}

int lowrank_quantize_int4(const void* x, int dtype, std::uint8_t* codes, void* scales, void* zeros,
                          int scale_dtype, std::int64_t numel, std::int64_t group, int format,
                          float largest, const float* nf4, void*) {
  if (group % 2 != 0) return 1;
  return dispatch(dtype, [&]<typename T>(T*) {
    const T* values = static_cast<const T*>(x);
    parallel_for(ceil_divide(numel, group), group, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t g = begin; g < end; ++g) {
        const std::int64_t start = g * group, stop = std::min(start + group, numel);
        const GroupParameters own =
            parameters_of(values + start, stop - start, format, 15.0f, largest, scale_dtype);
        store_parameters(scales, zeros, scale_dtype, g, own);
        for (std::int64_t i = start; i < stop; i += 2) {
          std::uint32_t pair = int4_code(to_float(values[i]), own, format, nf4);
          if (i + 1 < stop) {
            pair |= static_cast<std::uint32_t>(int4_code(to_float(values[i + 1]), own, format, nf4))
                    << 4;
          }
          codes[i / 2] = static_cast<std::uint8_t>(pair);
        }
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
    parallel_for(ceil_divide(numel, group), group, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t g = begin; g < end; ++g) {
        const std::int64_t start = g * group, stop = std::min(start + group, numel);
        const GroupParameters own = load_parameters(scales, zeros, scale_dtype, g);
        for (std::int64_t i = start; i < stop; ++i) {
          const std::uint8_t code = (codes[i / 2] >> (4 * (i % 2))) & 15;
          values[i] = from_float<T>(value_of(code, own, format, nf4));
        }
      }
    });
    return 0;
  });
}
