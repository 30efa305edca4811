// Linear: y = x Wᵀ + b over a dense or a packed weight, of the input as it is, transformed or
// quantised.
#pragma once

#include <functional>
#include <memory>
#include <variant>

#include "autograd/ops.h"
#include "nn/kronecker.h"
#include "nn/linear_input.h"
#include "nn/packed_weight.h"
#include "tensor/tensor.h"

namespace omq::nn {

using Weight = std::variant<Tensor, std::shared_ptr<PackedWeight>>;

struct Linear {
  Weight weight;  // [out, in]
  Tensor bias;    // [out] or undefined
  // Transforms the input; what undoes it is in the weight. None: the input as it is.
  std::optional<Kronecker> online = {};
  std::function<Tensor(const Tensor&)> pre = {};  // applied to that: for onlookers
  // Every row of the input on its own grid: codes times codes where the weight is packed, simulated
  // (with gradients) where it is dense. None: the input as it is.
  std::optional<RowQuant> input_quant = {};
  // A share [1] of each row's range that stands in for input_quant->clip while it learns. Beside a
  // packed weight: the same number, for files.
  Tensor input_clip = {};

  // [..., in] → [..., out]; `write` as in linear() of autograd/ops.h.
  Tensor operator()(const LinearInput& x, WriteAs write = WriteAs::Wide) const;
  // The product with the quantised input alone: for what `pre` was given.
  Linear product() const;
  int64_t out_features() const;
  int64_t in_features() const;
  // The weight as a tensor. Throws Error when it is packed.
  const Tensor& dense() const;
  bool is_packed() const { return std::holds_alternative<std::shared_ptr<PackedWeight>>(weight); }
  void visit(const VisitFn& v);  // weight (or packed), bias, online.left, online.right, input_clip
};

// silu(gate(x)) ⊙ up(x), where a device multiplies codes and makes it of the sums at once; else
// undefined, and nothing is done. No gradient.
Tensor gated_product(const Linear& gate, const Linear& up, const LinearInput& x);

// x [..., K] · wᵀ with w [N, K] of F32, BF16 or F16. Weights of 16 bits take no gradient and are
// never widened whole.
Tensor dense_linear(const Tensor& x, const Tensor& w, const Tensor& bias,
                    WriteAs write = WriteAs::Wide);

}  // namespace omq::nn
