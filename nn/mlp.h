// SwiGLU: down(silu(gate(x)) ⊙ up(x)).
#pragma once

#include "autograd/ops.h"
#include "nn/linear.h"

namespace omq::nn {

struct MLP {
  Linear gate_proj, up_proj, down_proj;  // [F, D], [F, D], [D, F]

  Tensor operator()(const Tensor& x) const {
    const LinearInput in(x);
    return down_proj(
        LinearInput::silu_mul(gate_proj(in, WriteAs::Operand), up_proj(in, WriteAs::Operand)));
  }
};

}  // namespace omq::nn
