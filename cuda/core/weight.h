// One entry of a weight's write-back.
#pragma once

#include "groups.h"

namespace lowrank {

// new = keep * old - alpha * delta - factor * grad
struct WriteBack {
  float keep;
  float alpha;
};

// Where a factor is 0 nothing is left of an entry, whatever it is: so a gradient that isn't finite
// is left out without a decision on the host.
LR_HD float scaled(float entry, float factor) { return factor != 0.0f ? entry * factor : 0.0f; }

LR_HD float written(float old, float delta, float residual, const WriteBack& write) {
  return write.keep * old - write.alpha * delta - residual;
}

}  // namespace lowrank
