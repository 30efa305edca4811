// LinearInput: what a Linear reads. q, k and v read one tensor, gate and up another; where that
// tensor is to be transformed or quantised, sharing its LinearInput does so once.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "nn/kronecker.h"
#include "tensor/row_quant.h"
#include "tensor/tensor.h"

namespace omq::nn {

// The rows of x [..., N] as codes, one a byte, and back. No history.
QuantizedRows quantized(const Tensor& x, RowQuant s);
Tensor dequantized(const QuantizedRows& q, DType dtype = DType::F32);

// Lives as long as one call; not shared between threads.
class LinearInput {
 public:
  LinearInput(Tensor x) : x_(std::move(x)) {}  // NOLINT(google-explicit-constructor): any tensor
  // silu(gate) ⊙ up, which is not stored where its codes are all that is asked for.
  static LinearInput silu_mul(Tensor gate, Tensor up);
  const Tensor& tensor() const;
  // Its rows as codes, and as the floats that these stand for, the latter with history. Made at the
  // first call, and again only when s changes.
  const QuantizedRows& codes(RowQuant s) const;
  const Tensor& simulated(RowQuant s) const;
  // The latter with a share [1] of the range that learns (Linear::input_clip).
  const Tensor& simulated(RowQuant s, const Tensor& share) const;
  // What a product that learns multiplies: `x`, this input or what was made of it, in the type of
  // the ComputeScope (on a GPU as it is: what makes it writes that type). Made at the first call,
  // and again only for another x.
  const Tensor& operand(const Tensor& x) const;
  // Its rows through k. Made at the first call, and again only for a k of other factors: those that
  // share one Storage are one.
  const LinearInput& transformed(const Kronecker& k) const;

 private:
  template <class T> struct Made {
    RowQuant s;
    T value;
  };
  mutable Tensor x_;  // undefined until it is asked for, if it is made of
  Tensor gate_, up_;  // these
  mutable std::optional<Made<QuantizedRows>> codes_;
  mutable std::optional<Made<Tensor>> simulated_;
  mutable Tensor share_, clipped_;  // the last such share, and what it gave
  mutable Tensor rounded_of_, rounded_;
  mutable std::optional<Kronecker> by_;
  mutable std::shared_ptr<const LinearInput> transformed_;
};

}  // namespace omq::nn
