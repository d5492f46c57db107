// Adam in a subspace on the host.
#include "../core/adam.h"

#include "../core/api.h"
#include "../core/blockwise.h"
#include "../core/weight.h"
#include "largest.h"
#include "parallel.h"

using namespace lowrank;

namespace {

AdamStep make_step(double beta1, double beta2, float eps, float size, const float* device_sizes,
                   int t) {
  if (device_sizes != nullptr) {
    eps = device_sizes[2 * t];
    size = device_sizes[2 * t + 1];
  }
  return {static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2), eps, size};
}

template <typename G, typename S, typename D>
void advance(const G* __restrict__ grad, S* __restrict__ exp_avg, S* __restrict__ exp_avg_sq,
             D* __restrict__ delta, std::int64_t begin, std::int64_t end, const AdamStep& step) {
  for (std::int64_t i = begin; i < end; ++i) {
    float m = to_float(exp_avg[i]), v = to_float(exp_avg_sq[i]);
    delta[i] = from_float<D>(adam_entry(to_float(grad[i]), m, v, step));
    exp_avg[i] = from_float<S>(m);
    exp_avg_sq[i] = from_float<S>(v);
  }
}

// The same, row by row, with norms of columns (axis 0) or rows (axis 1) summed in fp64.
template <typename G, typename S, typename D>
void advance_with_norms(const G* grad, S* exp_avg, S* exp_avg_sq, D* delta, std::int64_t rows,
                        std::int64_t columns, int axis, float* grad_norms, float* delta_norms,
                        const AdamStep& step) {
  const std::int64_t norms = axis == 0 ? columns : rows;
  std::vector<double> grad_squares(static_cast<std::size_t>(norms));
  std::vector<double> delta_squares(static_cast<std::size_t>(norms));
  std::vector<float> row(static_cast<std::size_t>(columns));
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t start = i * columns;
    advance(grad + start, exp_avg + start, exp_avg_sq + start, row.data(), 0, columns, step);
    for (std::int64_t j = 0; j < columns; ++j) {
      const auto at = static_cast<std::size_t>(axis == 0 ? j : i);
      const double g = to_float(grad[start + j]), d = row[static_cast<std::size_t>(j)];
      grad_squares[at] += g * g;
      delta_squares[at] += d * d;
      delta[start + j] = from_float<D>(row[static_cast<std::size_t>(j)]);
    }
  }
  for (std::int64_t i = 0; i < norms; ++i) {
    grad_norms[i] = static_cast<float>(std::sqrt(grad_squares[static_cast<std::size_t>(i)]));
    delta_norms[i] = static_cast<float>(std::sqrt(delta_squares[static_cast<std::size_t>(i)]));
  }
}

template <typename W, typename S>
void advance_weights(W* __restrict__ weight, const W* __restrict__ grad, S* __restrict__ exp_avg,
                     S* __restrict__ exp_avg_sq, std::int64_t begin, std::int64_t end,
                     const AdamStep& step, const WriteBack& write, bool counts) {
  for (std::int64_t i = begin; i < end; ++i) {
    float m = to_float(exp_avg[i]), v = to_float(exp_avg_sq[i]);
    const float delta = adam_entry(counts ? to_float(grad[i]) : 0.0f, m, v, step);
    weight[i] = from_float<W>(written(to_float(weight[i]), delta, 0.0f, write));
    exp_avg[i] = from_float<S>(m);
    exp_avg_sq[i] = from_float<S>(v);
  }
}

// One block of 8-bit moments: dequantises, advances, and leaves the new moments in m and v. Codes
// are bytes, which may alias everything: hence __restrict__.
template <typename G, typename D>
void advance_block(const G* __restrict__ grad, const std::uint8_t* __restrict__ m_codes,
                   const std::uint8_t* __restrict__ v_codes, D* __restrict__ delta,
                   float* __restrict__ m, float* __restrict__ v, std::int64_t length, float m_scale,
                   float v_scale, const float* __restrict__ maps, const AdamStep& step) {
  for (std::int64_t i = 0; i < length; ++i) {
    float m_entry = maps[m_codes[i]] * m_scale, v_entry = maps[256 + v_codes[i]] * v_scale;
    delta[i] = from_float<D>(adam_entry(to_float(grad[i]), m_entry, v_entry, step));
    m[i] = m_entry;
    v[i] = v_entry;
  }
}

}  // namespace

int lowrank_adam(int count, const void* const* grads, void* const* exp_avgs,
                 void* const* exp_avg_sqs, void* const* deltas, float* const* grad_norms,
                 float* const* delta_norms, const std::int64_t* rows, const std::int64_t* columns,
                 int axis, int grad_dtype, int state_dtype, int delta_dtype, double beta1,
                 double beta2, float eps, float size, const float* device_sizes, void*) {
  return dispatch_adam(
      grad_dtype, state_dtype, delta_dtype, [&]<typename G, typename S, typename D>(G*, S*, D*) {
        for (int t = 0; t < count; ++t) {
          const AdamStep step = make_step(beta1, beta2, eps, size, device_sizes, t);
          const G* grad = static_cast<const G*>(grads[t]);
          D* delta = static_cast<D*>(deltas[t]);
          S* m = static_cast<S*>(exp_avgs[t]);
          S* v = static_cast<S*>(exp_avg_sqs[t]);
          if (axis >= 0) {
            advance_with_norms(grad, m, v, delta, rows[t], columns[t], axis, grad_norms[t],
                               delta_norms[t], step);
            continue;
          }
          parallel_for(rows[t] * columns[t], 1, kRounded,
                       [&](std::int64_t begin, std::int64_t end) {
                         advance(grad, m, v, delta, begin, end, step);
                       });
        }
        return 0;
      });
}

int lowrank_adam_weights(int count, void* const* weights, const void* const* grads,
                         void* const* exp_avgs, void* const* exp_avg_sqs,
                         const std::int64_t* numels, int dtype, int state_dtype, double beta1,
                         double beta2, float eps, float size, float keep, float alpha,
                         const float* device_sizes, void*) {
  return dispatch_weights(dtype, state_dtype, [&]<typename W, typename S>(W*, S*) {
    for (int t = 0; t < count; ++t) {
      const float* own = device_sizes == nullptr ? nullptr : device_sizes + 4 * t;
      const AdamStep step = make_step(beta1, beta2, eps, size, own, 0);
      const WriteBack write = own == nullptr ? WriteBack{keep, alpha} : WriteBack{own[2], own[3]};
      const bool counts = own == nullptr || own[1] != 0.0f;
      W* weight = static_cast<W*>(weights[t]);
      const W* grad = static_cast<const W*>(grads[t]);
      S* m = static_cast<S*>(exp_avgs[t]);
      S* v = static_cast<S*>(exp_avg_sqs[t]);
      parallel_for(numels[t], 1, kRounded, [&](std::int64_t begin, std::int64_t end) {
        advance_weights(weight, grad, m, v, begin, end, step, write, counts);
      });
    }
    return 0;
  });
}

int lowrank_adam_8bit(int count, const void* const* grads, void* const* exp_avgs,
                      float* const* exp_avg_absmax, void* const* exp_avg_sqs,
                      float* const* exp_avg_sq_absmax, void* const* deltas,
                      const std::int64_t* numels, int grad_dtype, int delta_dtype, double beta1,
                      double beta2, float eps, float size, const float* device_sizes,
                      const std::int32_t* tables, const float* maps, void*) {
  constexpr std::int64_t kBlock = 256;
  constexpr int kSignedZero = 127;
  return dispatch_deltas(grad_dtype, delta_dtype, [&]<typename G, typename D>(G*, D*) {
    for (int t = 0; t < count; ++t) {
      const AdamStep step = make_step(beta1, beta2, eps, size, device_sizes, t);
      const G* grad = static_cast<const G*>(grads[t]);
      D* delta = static_cast<D*>(deltas[t]);
      auto* m_codes = static_cast<std::uint8_t*>(exp_avgs[t]);
      auto* v_codes = static_cast<std::uint8_t*>(exp_avg_sqs[t]);
      const std::int64_t blocks = ceil_divide(numels[t], kBlock);
      parallel_for(blocks, kBlock, kComputed, [&](std::int64_t begin, std::int64_t end) {
        float m[kBlock] = {}, v[kBlock] = {};
        for (std::int64_t b = begin; b < end; ++b) {
          const std::int64_t start = b * kBlock;
          const std::int64_t length = std::min(kBlock, numels[t] - start);
          advance_block(grad + start, m_codes + start, v_codes + start, delta + start, m, v, length,
                        exp_avg_absmax[t][b], exp_avg_sq_absmax[t][b], maps, step);
          const float m_largest = largest(m, length), v_largest = largest(v, length);
          exp_avg_absmax[t][b] = m_largest;
          exp_avg_sq_absmax[t][b] = v_largest;
          const float m_factor = reciprocal(m_largest), v_factor = reciprocal(v_largest);
          std::uint8_t fresh[2][kBlock];
          for (std::int64_t i = 0; i < kBlock; ++i) {
            fresh[0][i] = dynamic_code(m[i] * m_factor, tables, kSignedZero);
            fresh[1][i] = dynamic_code(v[i] * v_factor, tables + kEntries, 0);
          }
          std::copy(fresh[0], fresh[0] + length, m_codes + start);
          std::copy(fresh[1], fresh[1] + length, v_codes + start);
        }
      });
    }
    return 0;
  });
}
