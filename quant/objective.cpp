// Objectives.
#include "quant/objective.h"

#include "autograd/ops.h"

namespace omq::quant {

Objective block_mse() {
  return {[](const Tensor& y, const Targets& t) { return mse(y, t.of_fp); }, false};
}

Objective augmented_mse(double weight) {
  return {[weight](const Tensor& y, const Targets& t) {
            const Tensor added = mse(y, t.of_quant);
            return mse(y, t.of_fp) + (weight == 1 ? added : added * weight);
          },
          true};
}

}  // namespace omq::quant
