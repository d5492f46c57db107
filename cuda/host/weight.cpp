// Writing an update into a weight on the host: dense, or in eight or four bits.
#include "../core/weight.h"

#include <type_traits>

#include "../core/api.h"
#include "../core/int4_update.h"
#include "largest.h"
#include "packed.h"
#include "parallel.h"

using namespace lowrank;

namespace {

constexpr std::int64_t kChunk = 1024;  // entries worked on at once

// What is taken off each entry, besides decay; see core/api.h.
struct Update {
  const void* delta;
  int delta_dtype;
  const void* grad;
  int grad_dtype;
  const float* factors;
  std::int64_t row_stride;
  std::int64_t column_stride;
  std::int64_t columns;
  WriteBack write;
};

void load_floats(const void* data, int dtype, std::int64_t first, std::int64_t length,
                 float* __restrict__ out) {
  dispatch(dtype, [&]<typename T>(T*) {
    const T* entries = static_cast<const T*>(data) + first;
    for (std::int64_t i = 0; i < length; ++i) out[i] = to_float(entries[i]);
    return 0;
  });
}

// residual = factor o grad for entries [first, first + length), row by row.
void residuals(const Update& update, std::int64_t first, std::int64_t length,
               float* __restrict__ residual) {
  load_floats(update.grad, update.grad_dtype, first, length, residual);
  std::int64_t done = 0;
  while (done < length) {
    const std::int64_t row = (first + done) / update.columns;
    const std::int64_t column = first + done - row * update.columns;
    const std::int64_t count = std::min(length - done, update.columns - column);
    const float* factor = update.factors + row * update.row_stride;
    if (update.column_stride == 0) {
      for (std::int64_t i = 0; i < count; ++i) {
        residual[done + i] = scaled(residual[done + i], factor[0]);
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        residual[done + i] = scaled(residual[done + i], factor[column + i]);
      }
    }
    done += count;
  }
}

// Up to kChunk entries from flat position `first` on.
void apply(const Update& update, std::int64_t first, std::int64_t length,
           float* __restrict__ values) {
  float step[kChunk], residual[kChunk];
  if (update.delta != nullptr) {
    load_floats(update.delta, update.delta_dtype, first, length, step);
  } else {
    std::fill_n(step, length, 0.0f);
  }
  if (update.grad != nullptr) {
    residuals(update, first, length, residual);
  } else {
    std::fill_n(residual, length, 0.0f);
  }
  for (std::int64_t i = 0; i < length; ++i) {
    values[i] = written(values[i], step[i], residual[i], update.write);
  }
}

void round_stochastically(const float* __restrict__ values, std::int64_t length, std::uint64_t seed,
                          std::uint64_t first, bfloat16* __restrict__ out) {
  for (std::int64_t i = 0; i < length; ++i) {
    out[i] = stochastic_bfloat16(values[i], seed, first + static_cast<std::uint64_t>(i));
  }
}

// One group of a quantised weight, before and after; returns whether it changed.
bool update_group(const Update& update, const std::uint8_t* __restrict__ codes, GroupParameters old,
                  std::int64_t start, std::int64_t length, float* __restrict__ fresh) {
  bool changed = false;
  for (std::int64_t begin = 0; begin < length; begin += kChunk) {
    const std::int64_t count = std::min(kChunk, length - begin);
    float before[kChunk];
    for (std::int64_t i = 0; i < count; ++i) {
      before[i] = value_of(codes[begin + i], old, kAffine, nullptr);
      fresh[begin + i] = before[i];
    }
    apply(update, start + begin, count, fresh + begin);
    int differing = 0;
    for (std::int64_t i = 0; i < count; ++i) differing += fresh[begin + i] != before[i];
    changed = changed || differing != 0;
  }
  return changed;
}

GroupParameters range_of(const float* x, std::int64_t length, int scale_dtype) {
  std::int32_t low = 0, high = 0;  // keys of 0, which is in every range
  for (std::int64_t i = 0; i < length; ++i) {
    low = std::min(low, order_key(x[i]));
    high = std::max(high, order_key(x[i]));
  }
  return group_parameters(from_order_key(low), from_order_key(high), kAffine, 255.0f, 1.0f / 255.0f,
                          scale_dtype);
}

void stochastic_codes(const float* __restrict__ x, std::int64_t length, GroupParameters own,
                      std::uint64_t seed, std::uint64_t first, std::uint8_t* __restrict__ codes) {
  for (std::int64_t i = 0; i < length; ++i) {
    codes[i] = stochastic_code(x[i], own, 255.0f, seed, first + static_cast<std::uint64_t>(i));
  }
}

void spread_codes(const float* __restrict__ x, std::int64_t length, float scale, std::uint64_t seed,
                  std::uint64_t first, std::uint32_t moved, std::uint8_t* __restrict__ codes) {
  for (std::int64_t i = 0; i < length; ++i) {
    const float noise = spread_uniform(seed, first + static_cast<std::uint64_t>(i), moved);
    codes[i] = spread_code(x[i], scale, noise);
  }
}

}  // namespace

int lowrank_write_back(void* weight, int dtype, const void* delta, int delta_dtype,
                       const void* grad, int grad_dtype, const float* factors,
                       std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                       std::int64_t columns, float keep, float alpha, int stochastic,
                       std::uint64_t seed, std::uint64_t first, const float* device_sizes,
                       const std::int64_t* device_seed, void*) {
  if (device_seed != nullptr) seed = static_cast<std::uint64_t>(*device_seed);
  const WriteBack write = WriteSizes{{keep, alpha}, device_sizes}.read();
  const Update update{delta,      delta_dtype,   grad,    grad_dtype, factors,
                      row_stride, column_stride, columns, write};
  const std::int64_t numel = rows * columns;
  return dispatch(dtype, [&]<typename T>(T*) {
    parallel_for(ceil_divide(numel, kChunk), kChunk, kRounded,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t start = begin * kChunk; start < std::min(end * kChunk, numel);
                        start += kChunk) {
                     const std::int64_t length = std::min(kChunk, numel - start);
                     T* own = static_cast<T*>(weight) + start;
                     float values[kChunk];
                     load_floats(weight, dtype, start, length, values);
                     apply(update, start, length, values);
                     if constexpr (std::is_same_v<T, bfloat16>) {
                       if (stochastic) {
                         const std::uint64_t position = first + static_cast<std::uint64_t>(start);
                         round_stochastically(values, length, seed, position, own);
                         continue;
                       }
                     }
                     for (std::int64_t i = 0; i < length; ++i) own[i] = from_float<T>(values[i]);
                   }
                 });
    return 0;
  });
}

int lowrank_write_back_list(int count, void* const* weights, const void* const* grads,
                            const float* const* factors, int dtype, std::int64_t row_stride,
                            std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                            float keep, void* stream) {
  for (int t = 0; t < count; ++t) {
    const int error = lowrank_write_back(weights[t], dtype, nullptr, kFloat32, grads[t], dtype,
                                         factors[t], row_stride, column_stride, rows, columns, keep,
                                         0.0f, 0, 0, 0, nullptr, nullptr, stream);
    if (error != 0) return error;
  }
  return 0;
}

int lowrank_write_back_int8(std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                            const void* delta, int delta_dtype, const void* grad, int grad_dtype,
                            const float* factors, std::int64_t row_stride,
                            std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                            std::int64_t group, float keep, float alpha, std::uint64_t seed,
                            std::uint64_t first, const float* device_sizes,
                            const std::int64_t* device_seed, void*) {
  if (device_seed != nullptr) seed = static_cast<std::uint64_t>(*device_seed);
  const WriteBack write = WriteSizes{{keep, alpha}, device_sizes}.read();
  const Update update{delta,      delta_dtype,   grad,    grad_dtype, factors,
                      row_stride, column_stride, columns, write};
  const std::int64_t numel = rows * columns;
  parallel_for(
      ceil_divide(numel, group), group, kRequantised, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> fresh(static_cast<std::size_t>(group));
        for (std::int64_t g = begin; g < end; ++g) {
          const std::int64_t start = g * group, length = std::min(group, numel - start);
          const GroupParameters old{load(scales, scale_dtype, g), load(zeros, scale_dtype, g)};
          if (!update_group(update, codes + start, old, start, length, fresh.data())) continue;
          const GroupParameters own = range_of(fresh.data(), length, scale_dtype);
          store(scales, scale_dtype, g, own.scale);
          store(zeros, scale_dtype, g, own.zero);
          stochastic_codes(fresh.data(), length, own, seed,
                           first + static_cast<std::uint64_t>(start), codes + start);
        }
      });
  return 0;
}

int lowrank_write_back_int4(std::uint8_t* codes, void* scales, int scale_dtype, const void* delta,
                            int delta_dtype, const void* grad, int grad_dtype, const float* factors,
                            std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                            std::int64_t columns, std::int64_t group, float keep, float alpha,
                            std::uint64_t seed, std::uint64_t first, std::int64_t turn,
                            const float* device_sizes, const std::int64_t* device_turn, void*) {
  if (group % 2 != 0) return 1;
  const std::uint32_t moved = turned(device_turn == nullptr ? turn : *device_turn);
  const WriteBack write = WriteSizes{{keep, alpha}, device_sizes}.read();
  const Update update{delta,      delta_dtype,   grad,    grad_dtype, factors,
                      row_stride, column_stride, columns, write};
  const std::int64_t numel = rows * columns;
  parallel_for(
      ceil_divide(numel, group), group, kRequantised, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> fresh(static_cast<std::size_t>(group));
        std::vector<std::uint8_t> own(static_cast<std::size_t>(group));
        for (std::int64_t g = begin; g < end; ++g) {
          const std::int64_t start = g * group, length = std::min(group, numel - start);
          const float present = load(scales, scale_dtype, g);
          unpack(codes + start / 2, length, own.data());
          // Codes are read as with a zero point in the middle.
          if (!update_group(update, own.data(), {present, kMiddle}, start, length, fresh.data())) {
            continue;
          }
          const float scale = fitting_scale(largest(fresh.data(), length), present, scale_dtype);
          store(scales, scale_dtype, g, scale);
          spread_codes(fresh.data(), length, scale, seed, first + static_cast<std::uint64_t>(start),
                       moved, own.data());
          pack(own.data(), length, codes + start / 2);
        }
      });
  return 0;
}
