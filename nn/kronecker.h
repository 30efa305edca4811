// Kronecker: a transform of rows that is cheap enough to stay in the running model. x ↦ x·(L ⊗ R),
// a row of n = n₁·n₂ numbers being read as a matrix X [n₁, n₂]: then it is Lᵀ·X·R, two small
// products in place of one of [n, n].
#pragma once

#include "nn/packed_weight.h"

namespace omq::nn {

struct Kronecker {
  Tensor left;   // L [n₁, n₁]; undefined: the identity of n/n₂
  Tensor right;  // R [n₂, n₂]; undefined: the identity of n/n₁

  // x [..., n] → [..., n] in the type of x; differentiable in x, L and R. Multiplies in the type of
  // the factors whatever the ComputeScope: 16 bits are widened. Throws Error when the sizes do not
  // fit n.
  Tensor operator()(const Tensor& x) const;
  // Whether both have the very same factors: views of one Storage, or none.
  bool same_as(const Kronecker& o) const;
  // Whether factors of these sizes (0: none) can transform rows of n numbers.
  static bool sizes_fit(int64_t left, int64_t right, int64_t n);
  // Floating-point operations for a row of n numbers.
  int64_t operations(int64_t n) const;
  void visit(const VisitFn& v);  // "left", "right", those that are defined
};

}  // namespace omq::nn
