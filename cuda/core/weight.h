// One entry of a weight's write-back.
#pragma once

#include "groups.h"

namespace lowrank {

// new = keep * old - alpha * delta - factor * grad
struct WriteBack {
  float keep;
  float alpha;
};

LR_HD float written(float old, float delta, float residual, const WriteBack& write) {
  return write.keep * old - write.alpha * delta - residual;
}

}  // namespace lowrank
