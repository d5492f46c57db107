// Calls every kernel in the simulator, for ThreadSanitizer: a barrier that is missing between
// threads of a block, or of a warp, is a race here.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../cuda/core/api.h"
#include "../../cuda/core/blockwise.h"
#include "../../cuda/core/groups.h"

namespace {

constexpr std::int64_t kRows = 11, kColumns = 150, kNumel = kRows * kColumns;
constexpr std::int64_t kGroup = 256, kGroups = (kNumel + kGroup - 1) / kGroup;

int failures = 0;

void check(const char* name, int code) {
  if (code == 0) return;
  std::printf("%s returned %d\n", name, code);
  ++failures;
}

}  // namespace

int main() {
  std::vector<float> x(kNumel), m(kNumel), v(kNumel), delta(kNumel), factors(kColumns, 0.1f);
  for (std::int64_t i = 0; i < kNumel; ++i) {
    x[i] = static_cast<float>(i % 41) - 20.0f;
    v[i] = static_cast<float>(i % 7);
  }
  std::vector<std::uint8_t> codes(kNumel), others(kNumel), packed(kNumel / 2 + 1);
  std::vector<std::uint16_t> half(kNumel);
  std::vector<float> scales(kGroups, 0.5f), zeros(kGroups, 3.0f), norms(2 * kNumel);
  std::vector<std::int32_t> tables(2 * lowrank::kEntries, 0xFFFF);
  std::vector<float> maps(512, 0.25f), nf4(16, 0.0f);
  const int single = lowrank::kFloat32;

  // Blocks of more than 256 entries take the loops that blocks of 256 don't.
  for (const std::int64_t group : {kGroup, std::int64_t{600}}) {
    check("quantize_blockwise",
          lowrank_quantize_blockwise(x.data(), single, codes.data(), scales.data(), kNumel, group,
                                     tables.data(), 127, nullptr));
    check("dequantize_blockwise",
          lowrank_dequantize_blockwise(codes.data(), scales.data(), delta.data(), single, kNumel,
                                       group, maps.data(), nullptr));
    check("quantize_groups",
          lowrank_quantize_groups(x.data(), single, codes.data(), scales.data(), zeros.data(),
                                  single, kNumel, group, 255, 1, 7, 0, nullptr));
    check("dequantize_groups",
          lowrank_dequantize_groups(codes.data(), scales.data(), zeros.data(), single, delta.data(),
                                    single, kNumel, group, nullptr));
    const std::uint8_t* code_lists[] = {codes.data(), others.data()};
    const void* scale_lists[] = {scales.data(), scales.data()};
    const void* zero_lists[] = {zeros.data(), zeros.data()};
    void* outs[] = {delta.data(), m.data()};
    const std::int64_t numels[] = {kNumel, kNumel};
    check("dequantize_groups_list",
          lowrank_dequantize_groups_list(2, code_lists, scale_lists, zero_lists, single, outs,
                                         numels, single, group, nullptr));
    check("quantize_int4",
          lowrank_quantize_int4(x.data(), single, packed.data(), scales.data(), nullptr, single,
                                kNumel, group, lowrank::kNf4, 1.0f, nf4.data(), nullptr));
    check("dequantize_int4",
          lowrank_dequantize_int4(packed.data(), scales.data(), nullptr, single, delta.data(),
                                  single, kNumel, group, lowrank::kNf4, nf4.data(), nullptr));
    const std::uint8_t* packed_lists[] = {packed.data(), packed.data()};
    check("dequantize_int4_list",
          lowrank_dequantize_int4_list(2, packed_lists, scale_lists, nullptr, single, outs, numels,
                                       single, group, lowrank::kNf4, nf4.data(), nullptr));
    check("write_back_int8",
          lowrank_write_back_int8(codes.data(), scales.data(), zeros.data(), single, delta.data(),
                                  single, x.data(), single, factors.data(), 0, 1, kRows, kColumns,
                                  group, 0.9f, 0.1f, 7, 0, nullptr, nullptr, nullptr));
    check("write_back_int4",
          lowrank_write_back_int4(packed.data(), scales.data(), single, delta.data(), single,
                                  x.data(), single, factors.data(), 0, 1, kRows, kColumns, group,
                                  0.9f, 0.1f, 7, 0, 3, nullptr, nullptr, nullptr));
  }
  check("rademacher", lowrank_rademacher(delta.data(), single, kNumel, 7, nullptr));
  const std::int64_t key = 7;
  for (const std::uint64_t first : {4u, 6u}) {
    check("gaussian", lowrank_gaussian(delta.data(), single, kNumel, 0, &key, first, nullptr));
  }
  void* normals[] = {delta.data(), m.data()};
  const std::int64_t counts[] = {kNumel, 3};
  const std::int64_t* keys[] = {&key, &key};
  check("gaussian_list",
        lowrank_gaussian_list(2, normals, counts, nullptr, keys, single, 0.5f, nullptr));
  check("stochastic_bfloat16",
        lowrank_stochastic_bfloat16(x.data(), half.data(), kNumel, 7, 0, nullptr, nullptr));
  const float step = 3.0f;
  const float* steps[] = {&step, &step};
  const std::uint64_t states[] = {5, 6};
  std::int64_t seeds[2];
  check("step_seeds", lowrank_step_seeds(2, steps, states, 7, seeds, nullptr));
  check("write_back", lowrank_write_back(half.data(), lowrank::kBfloat16, delta.data(), single,
                                         x.data(), single, factors.data(), 0, 1, kRows, kColumns,
                                         0.9f, 0.1f, 1, 7, 0, nullptr, seeds, nullptr));

  void* written[] = {delta.data(), m.data()};
  const void* taken[] = {x.data(), x.data()};
  const float* factor_lists[] = {factors.data(), factors.data()};
  check("write_back_list", lowrank_write_back_list(2, written, taken, factor_lists, single, 0, 1,
                                                   kRows, kColumns, 0.9f, nullptr));

  float norm = 2.0f, stored = 1.0f, factor = 0.0f;
  float* const last[] = {&stored};
  check("limit_growth", lowrank_limit_growth(1, last, &norm, nullptr, &factor, 1.01f, nullptr));

  std::vector<float> row_scales(2 * kRows, 0.5f), roots(kRows, 0.3f);
  for (const int bits : {4, 8}) {
    check("cautious_rows",
          lowrank_cautious_rows(x.data(), single, codes.data(), row_scales.data(), roots.data(),
                                factors.data(), delta.data(), kRows, kColumns, bits, 1, 0.1f, 1e-8f,
                                0.5f, 1.0f / kColumns, 7, 0, kColumns, nullptr));
  }

  const void* grads[] = {x.data()};
  void* exp_avgs[] = {m.data()};
  void* exp_avg_sqs[] = {v.data()};
  void* deltas[] = {delta.data()};
  float* grad_norms[] = {norms.data()};
  float* delta_norms[] = {norms.data() + kNumel};
  for (const int axis : {-1, 0, 1}) {
    check("adam", lowrank_adam(1, grads, exp_avgs, exp_avg_sqs, deltas, grad_norms, delta_norms,
                               &kRows, &kColumns, axis, single, single, single, 0.9, 0.999, 1e-8f,
                               0.1f, nullptr, nullptr));
  }
  void* weights[] = {x.data()};
  const void* others_grads[] = {delta.data()};
  check("adam_weights",
        lowrank_adam_weights(1, weights, others_grads, exp_avgs, exp_avg_sqs, &kNumel, single,
                             single, 0.9, 0.999, 1e-8f, 0.1f, 0.9f, 0.1f, nullptr, nullptr));
  void* m_codes[] = {codes.data()};
  void* v_codes[] = {others.data()};
  float* m_scales[] = {scales.data()};
  float* v_scales[] = {zeros.data()};
  check("adam_8bit", lowrank_adam_8bit(1, grads, m_codes, m_scales, v_codes, v_scales, deltas,
                                       &kNumel, single, single, 0.9, 0.999, 1e-8f, 0.1f, nullptr,
                                       tables.data(), maps.data(), nullptr));
  return failures == 0 ? 0 : 1;
}
