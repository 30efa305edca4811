// SwiGLU: down(silu(gate(x)) ⊙ up(x)).
#pragma once

#include "autograd/ops.h"
#include "nn/linear.h"

namespace omq::nn {

struct MLP {
  Linear gate_proj, up_proj, down_proj;  // [F, D], [F, D], [D, F]

  Tensor operator()(const Tensor& x) const {
    const LinearInput in(x);
    if (const Tensor gated = gated_product(gate_proj, up_proj, in); gated.defined())
      return down_proj(gated);
    return down_proj(
        LinearInput::silu_mul(gate_proj(in, WriteAs::Operand), up_proj(in, WriteAs::Operand)));
  }
};

}  // namespace omq::nn
