// Objective: what the quantised block's output is compared with (Eq. 1), as a function of tensors.
#pragma once

#include <functional>

#include "tensor/tensor.h"

namespace omq::quant {

struct Targets {
  Tensor of_fp;     // F(W, X): full-precision block on the full-precision stream
  Tensor of_quant;  // F(W, X_quant): the same block on the quantised stream; only when the
                    // objective asks
};

struct Objective {
  std::function<Tensor(const Tensor& y_quant, const Targets& t)> loss;  // → [1]
  bool wants_of_quant = false;
};

Objective block_mse();  // ‖y − F(W, X)‖² / elements
// The same + weight · ‖y − F(W, X_quant)‖² / elements: the official --aug_loss, there with
// weight 1.
Objective augmented_mse(double weight = 1);

// Mean over channels of |μ − μ_fp| + |σ² − σ²_fp|, means and variances over all tokens of the batch
// (Norm Tweaking, spec weight-methods §6).
Objective channel_statistics();

}  // namespace omq::quant
