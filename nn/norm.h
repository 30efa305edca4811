// RMSNorm, with the bias that LET's shift may add (spec omniquant §4.4).
#pragma once

#include "autograd/ops.h"
#include "nn/packed_weight.h"

namespace omq::nn {

struct RMSNorm {
  Tensor weight;  // [D]
  Tensor bias;    // [D] or undefined
  double eps = 1e-5;

  Tensor operator()(const Tensor& x) const {
    return rms_norm(x, weight, bias, eps);
  }  // [...,D] → [...,D]
  void visit(const VisitFn& v) {
    v("weight", weight);
    if (bias.defined()) v("bias", bias);
  }
};

}  // namespace omq::nn
