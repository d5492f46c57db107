// One entry of Adam; see optimizers/rules/adam.py for the formulas.
#pragma once

#include "common.h"

namespace lowrank {

// `size` contains the bias corrections, `eps` is added to the uncorrected root.
struct AdamStep {
  float first_share;  // 1 - b1
  float beta2;
  float second_share;  // 1 - b2
  float eps;
  float size;
};

// Advances both moments; returns size * m / (sqrt(v) + eps).
LR_HD float adam_entry(float grad, float& m, float& v, const AdamStep& step) {
  m += step.first_share * (grad - m);
  v = step.beta2 * v + step.second_share * grad * grad;
  return step.size * (m / (sqrtf(v) + step.eps));
}

// Calls f with null pointers of the types of gradients and deltas. Deltas are fp32, or bf16 where
// gradients are.
template <typename F>
int dispatch_deltas(int grad_dtype, int delta_dtype, const F& f) {
  constexpr float* kSingle = nullptr;
  constexpr bfloat16* kHalf = nullptr;
  if (grad_dtype == kFloat32 && delta_dtype == kFloat32) return f(kSingle, kSingle);
  if (grad_dtype == kBfloat16 && delta_dtype == kFloat32) return f(kHalf, kSingle);
  if (grad_dtype == kBfloat16 && delta_dtype == kBfloat16) return f(kHalf, kHalf);
  return 1;  // cudaErrorInvalidValue
}

// Calls f with null pointers of the types of weights (and gradients) and of moments, which are
// fp32, or as the weights.
template <typename F>
int dispatch_weights(int dtype, int state_dtype, const F& f) {
  return dispatch_deltas(dtype, state_dtype, f);
}

// As `dispatch_deltas`, for moments too, which are fp32, or bf16 where gradients are.
template <typename F>
int dispatch_adam(int grad_dtype, int state_dtype, int delta_dtype, const F& f) {
  return dispatch_deltas(grad_dtype, delta_dtype, [&]<typename G, typename D>(G* grad, D* delta) {
    if (state_dtype == kFloat32) return f(grad, static_cast<float*>(nullptr), delta);
    if (state_dtype == grad_dtype) return f(grad, static_cast<G*>(nullptr), delta);
    return 1;
  });
}

}  // namespace lowrank
