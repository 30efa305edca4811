// Invertible: square matrices that learn and have an inverse whatever they have learned (FlatQuant,
// arXiv 2410.09426, learns U·diag(s)·Vᵀ with two Cayley maps instead).
//
//   P = Q·(I + E₋)·diag(e^E₀)·(I + E₊)
//
// Q is orthogonal and fixed, E [n, n] is what learns, from 0; E₋, E₀ and E₊ are what stands below,
// on and above its diagonal. E moves P in every direction, by Q·E in first order. There is nothing
// to solve for P⁻¹ = (I + E₊)⁻¹·diag(e^−E₀)·(I + E₋)⁻¹·Qᵀ: unit triangular matrices are inverted by
// a few products, so that a recorded training step can do it.
#pragma once

#include "tensor/tensor.h"

namespace omq::quant {

class Invertible {
 public:
  // P = q [n, n] at first. count: how many matrices that start alike, [count, n, n]; 0: one, [n,
  // n]. All of it in q's type and on its device.
  explicit Invertible(const Tensor& q, int64_t count = 0);

  const Tensor& learnable() const { return e_; }
  // P and P⁻ᵀ, in the shape of learnable() and differentiable in it.
  struct Pair {
    Tensor matrix, inverse_transposed;
  };
  Pair operator()() const;

 private:
  Tensor q_, lower_, upper_, diagonal_;  // the latter three [n, n]: 1 there, else 0
  Tensor e_;
};

}  // namespace omq::quant
