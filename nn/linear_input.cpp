// LinearInput: one transform and one quantisation for all readers.
#include "nn/linear_input.h"

#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq::nn {

QuantizedRows quantized(const Tensor& any, RowQuant s) {
  const Tensor x = contiguous(any.detach());
  Shape grid = x.shape();
  grid[grid.n - 1] = 2;
  QuantizedRows q{.codes = Tensor::empty(x.shape(), DType::U8, x.device()),
                  .grid = Tensor::empty(grid, DType::F32, x.device()),
                  .spec = s,
                  .cols = x.dim(-1)};
  packed_on(x).quantize_rows(q, x);
  return q;
}

Tensor dequantized(const QuantizedRows& q) {
  Shape shape = q.grid.shape();
  shape[shape.n - 1] = q.cols;
  Tensor y = Tensor::empty(shape, DType::F32, q.grid.device());
  packed_on(y).dequantize_rows(y, q);
  return y;
}

const QuantizedRows& LinearInput::codes(RowQuant s) const {
  check(!needs_grad(x_),
        "packed matmul: no gradient goes through packed weights; dequantize() to train");
  if (!codes_ || codes_->s != s) codes_ = {s, quantized(x_, s)};
  return codes_->value;
}

const Tensor& LinearInput::simulated(RowQuant s) const {
  if (!simulated_ || simulated_->s != s) simulated_ = {s, fake_quant_rows(x_, s)};
  return simulated_->value;
}

const Tensor& LinearInput::simulated(RowQuant s, const Tensor& share) const {
  if (!share_.defined() || share_.raw() != share.raw()) {
    clipped_ = fake_quant_rows(x_, s, share);
    share_ = share;
  }
  return clipped_;
}

const Tensor& LinearInput::operand(const Tensor& x) const {
  const DType type = operand_dtype(x.dtype());
  if (x.dtype() == type || x.device().type != DeviceType::CPU) return x;
  if (!rounded_.defined() || rounded_of_.raw() != x.raw()) {
    rounded_ = to(x, type);
    rounded_of_ = x;
  }
  return rounded_;
}

const LinearInput& LinearInput::transformed(const Kronecker& k) const {
  if (!by_ || !by_->same_as(k)) {
    transformed_ = std::make_shared<const LinearInput>(k(x_));
    by_ = k;
  }
  return *transformed_;
}

}  // namespace omq::nn
