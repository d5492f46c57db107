// One entry of a weight's write-back.
#pragma once

#include "groups.h"

namespace lowrank {

// new = keep * old - alpha * delta - factor * grad
struct WriteBack {
  float keep;
  float alpha;
};

// The same where the numbers may be known only where the library computes.
struct WriteSizes {
  WriteBack given;
  const float* device;  // replaces `given` if not null

  LR_HD WriteBack read() const {
    return device == nullptr ? given : WriteBack{device[0], device[1]};
  }
};

// Where a factor is 0 nothing is left of an entry, whatever it is: so a gradient that isn't finite
// is left out without a decision on the host.
LR_HD float scaled(float entry, float factor) { return factor != 0.0f ? entry * factor : 0.0f; }

LR_HD float written(float old, float delta, float residual, const WriteBack& write) {
  return write.keep * old - write.alpha * delta - residual;
}

}  // namespace lowrank
