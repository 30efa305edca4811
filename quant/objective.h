// Objective: what the quantised block's output is compared with (Eq. 1), as a function of tensors.
#pragma once

#include <cstdint>
#include <functional>

#include "tensor/tensor.h"

namespace omq::quant {

struct Targets {
  Tensor of_fp;     // F(W, X): full-precision block on the full-precision stream
  Tensor of_quant;  // F(W, X_quant): the same block on the quantised stream; only when the
                    // objective asks
};

// What a token counts in a block's error.
enum class TokenWeight : uint8_t {
  Equal,        // nothing more than its squared error: Eq. 1
  InverseSize,  // that over the root mean square of its target. Where single tokens are a thousand
                // times as large as the others (massive activations, arXiv 2402.17762), Eq. 1
                // learns these alone; so each counts by its size, not by the square of it
};

struct Objective {
  std::function<Tensor(const Tensor& y_quant, const Targets& t)> loss;  // → [1]
  bool wants_of_quant = false;
  TokenWeight weight = TokenWeight::Equal;  // which of them `loss` takes
};

Objective block_mse(TokenWeight w = TokenWeight::Equal);  // ‖y − F(W, X)‖² / elements
// The same + weight · ‖y − F(W, X_quant)‖² / elements: the official --aug_loss, there with
// weight 1.
Objective augmented_mse(double weight = 1, TokenWeight w = TokenWeight::Equal);

// Mean over channels of |μ − μ_fp| + |σ² − σ²_fp|, means and variances over all tokens of the batch
// (Norm Tweaking, spec weight-methods §6).
Objective channel_statistics();

}  // namespace omq::quant
