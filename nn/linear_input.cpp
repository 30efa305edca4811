// LinearInput: one transform and one quantisation for all readers.
#include "nn/linear_input.h"

#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq::nn {

namespace {

// Where the codes of x [..., N] will stand: as signed bytes where a GPU multiplies many rows.
QuantizedRows rows_like(const Tensor& x, RowQuant s) {
  Shape grid = x.shape(), sums = x.shape();
  grid[grid.n - 1] = 2;
  sums[sums.n - 1] = 1;
  const bool as_signed = x.device().type != DeviceType::CPU && x.numel() / x.dim(-1) > kFewRows;
  return {.codes = Tensor::empty(x.shape(), as_signed ? DType::I8 : DType::U8, x.device()),
          .sums = as_signed ? Tensor::empty(sums, DType::I32, x.device()) : Tensor{},
          .grid = Tensor::empty(grid, DType::F32, x.device()),
          .spec = s,
          .cols = x.dim(-1),
          .paired = false};
}

}  // namespace

QuantizedRows quantized(const Tensor& any, RowQuant s) {
  const Tensor x = contiguous(any.detach());
  QuantizedRows q = rows_like(x, s);
  packed_on(x).quantize_rows(q, x);
  return q;
}

Tensor dequantized(const QuantizedRows& q, DType dtype) {
  Shape shape = q.grid.shape();
  shape[shape.n - 1] = q.cols;
  Tensor y = Tensor::empty(shape, dtype, q.grid.device());
  packed_on(y).dequantize_rows(y, q);
  return y;
}

LinearInput LinearInput::silu_mul(Tensor gate, Tensor up) {
  check(gate.shape() == up.shape(), "silu_mul: gate {} and up {} differ", gate.shape(), up.shape());
  LinearInput in(Tensor{});
  in.gate_ = std::move(gate), in.up_ = std::move(up);
  return in;
}

const Tensor& LinearInput::tensor() const {
  if (!x_.defined()) x_ = omq::silu_mul(gate_, up_);
  return x_;
}

const QuantizedRows& LinearInput::codes(RowQuant s) const {
  const auto made_of = [](const Tensor& t) { return t.defined() && needs_grad(t); };
  check(!made_of(x_) && !made_of(gate_) && !made_of(up_),
        "packed matmul: no gradient goes through packed weights; dequantize() to train");
  if (codes_ && codes_->s == s) return codes_->value;
  if (x_.defined()) {
    codes_ = {s, quantized(x_, s)};
  } else {
    const Tensor gate = contiguous(gate_.detach()), up = contiguous(up_.detach());
    codes_ = {s, rows_like(gate, s)};
    packed_on(gate).quantize_silu_mul(codes_->value, gate, up);
  }
  return codes_->value;
}

const Tensor& LinearInput::simulated(RowQuant s) const {
  if (!simulated_ || simulated_->s != s) simulated_ = {s, fake_quant_rows(tensor(), s)};
  return simulated_->value;
}

const Tensor& LinearInput::simulated(RowQuant s, const Tensor& share) const {
  if (!share_.defined() || share_.raw() != share.raw()) {
    clipped_ = fake_quant_rows(tensor(), s, share);
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
    transformed_ = std::make_shared<const LinearInput>(k(tensor()));
    by_ = k;
  }
  return *transformed_;
}

}  // namespace omq::nn
