// Objectives.
#include "quant/objective.h"

#include "autograd/ops.h"

namespace omq::quant {

Objective block_mse() {
  return {[](const Tensor& y, const Targets& t) { return mse(y, t.of_fp); }, false};
}

Objective augmented_mse() {
  return {[](const Tensor& y, const Targets& t) { return mse(y, t.of_fp) + mse(y, t.of_quant); },
          true};
}

}  // namespace omq::quant
