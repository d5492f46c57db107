// Writing an update into a weight on the host: dense, or in eight bits.
#include "../core/weight.h"

#include "../core/api.h"
#include "parallel.h"

using namespace lowrank;

namespace {

// What is taken off each entry, besides decay.
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

  float apply(float old, std::int64_t i) const {
    const float step = delta == nullptr ? 0.0f : load(delta, delta_dtype, i);
    float residual = 0.0f;
    if (grad != nullptr) {
      residual = factors[i / columns * row_stride + i % columns * column_stride] *
                 load(grad, grad_dtype, i);
    }
    return written(old, step, residual, write);
  }
};

}  // namespace

int lowrank_write_back(void* weight, int dtype, const void* delta, int delta_dtype,
                       const void* grad, int grad_dtype, const float* factors,
                       std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                       std::int64_t columns, float keep, float alpha, int stochastic,
                       std::uint64_t seed, std::uint64_t first, void*) {
  const Update update{delta,      delta_dtype,   grad,    grad_dtype,   factors,
                      row_stride, column_stride, columns, {keep, alpha}};
  parallel_for(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * columns; i < end * columns; ++i) {
      const float fresh = update.apply(load(weight, dtype, i), i);
      if (stochastic && dtype == kBfloat16) {
        static_cast<bfloat16*>(weight)[i] =
            stochastic_bfloat16(fresh, seed, first + static_cast<std::uint64_t>(i));
      } else {
        store(weight, dtype, i, fresh);
      }
    }
  });
  return 0;
}

int lowrank_write_back_int8(std::uint8_t* codes, void* scales, void* zeros, int scale_dtype,
                            const void* delta, int delta_dtype, const void* grad, int grad_dtype,
                            const float* factors, std::int64_t row_stride,
                            std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                            std::int64_t group, float keep, float alpha, std::uint64_t seed,
                            std::uint64_t first, void*) {
  const Update update{delta,      delta_dtype,   grad,    grad_dtype,   factors,
                      row_stride, column_stride, columns, {keep, alpha}};
  const std::int64_t numel = rows * columns;
  parallel_for(ceil_divide(numel, group), group, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> fresh(static_cast<std::size_t>(group));
    for (std::int64_t g = begin; g < end; ++g) {
      const std::int64_t start = g * group, length = std::min(group, numel - start);
      const GroupParameters old{load(scales, scale_dtype, g), load(zeros, scale_dtype, g)};
      bool changed = false;
      float low = 0.0f, high = 0.0f;
      for (std::int64_t i = 0; i < length; ++i) {
        const float before = value_of(codes[start + i], old, kAffine, nullptr);
        const float after = update.apply(before, start + i);
        fresh[static_cast<std::size_t>(i)] = after;
        changed = changed || after != before;
        low = min_or_nan(low, after);
        high = max_or_nan(high, after);
      }
      if (!changed) continue;
      const GroupParameters own = group_parameters(low, high, kAffine, 255.0f, 1.0f, scale_dtype);
      store(scales, scale_dtype, g, own.scale);
      store(zeros, scale_dtype, g, own.zero);
      for (std::int64_t i = 0; i < length; ++i) {
        codes[start + i] = stochastic_code(fresh[static_cast<std::size_t>(i)], own, 255.0f, seed,
                                           first + static_cast<std::uint64_t>(start + i));
      }
    }
  });
  return 0;
}
