// PackedIntWeight: shapes around the packed kernels.
#include "nn/packed_weight.h"

#include "autograd/compute.h"
#include "autograd/ops.h"
#include "nn/linear_input.h"

namespace omq::nn {

namespace {

// An empty result [rows, cols] on a device.
Tensor result(int64_t rows, int64_t cols, Device device, WriteAs write) {
  return Tensor::empty({rows, cols}, halves_wanted(rows, device, write) ? DType::F16 : DType::F32,
                       device);
}

// x as [rows, columns], and the shape of a product with it.
QuantizedRows flat(const QuantizedRows& x, const PackedInt& w) {
  check(x.cols == w.cols, "packed matmul: codes {} against a weight [{}, {}]", x.codes.shape(),
        w.rows, w.cols);
  QuantizedRows rows = x;
  rows.codes = reshape(x.codes, {-1, w.cols});
  rows.grid = reshape(x.grid, {-1, 2});
  if (x.as_signed()) rows.sums = reshape(x.sums, {-1});
  return rows;
}
Shape shape_behind(const QuantizedRows& x, const PackedInt& w) {
  Shape shape = x.codes.shape();
  shape[shape.n - 1] = w.rows;
  return shape;
}

}  // namespace

bool halves_wanted(int64_t rows, Device device, WriteAs write) {
  return write == WriteAs::Operand && device.type != DeviceType::CPU && rows > kFewRows &&
         operand_dtype(DType::F32) == DType::F16;
}

Tensor PackedWeight::matmul(const QuantizedRows& x, WriteAs write) const {
  return matmul(dequantized(x), write);
}

Tensor PackedIntWeight::matmul(const Tensor& x, WriteAs write) const {
  check(x.dim(-1) == w_.cols, "packed matmul: x {} against a weight [{}, {}]", x.shape(), w_.rows,
        w_.cols);
  check(!needs_grad(x),
        "packed matmul: no gradient goes through packed weights; dequantize() to train");
  const Tensor rows = reshape(x, {-1, w_.cols});
  Tensor y = result(rows.dim(0), w_.rows, x.device(), write);
  packed_on(x).packed_matmul(y, rows, w_);
  Shape shape = x.shape();
  shape[shape.n - 1] = w_.rows;
  return reshape(y, shape);
}

Tensor PackedIntWeight::matmul(const QuantizedRows& x, WriteAs write) const {
  if (!x.spec.include_zero) return PackedWeight::matmul(x, write);
  const QuantizedRows rows = flat(x, w_);
  Tensor y = result(rows.codes.dim(0), w_.rows, x.codes.device(), write);
  packed_on(y).packed_matmul_rows(y, rows, w_);
  return reshape(y, shape_behind(x, w_));
}

Tensor PackedIntWeight::gated(const QuantizedRows& x, const PackedIntWeight& up) const {
  if (!x.spec.include_zero) return {};
  const QuantizedRows rows = flat(x, w_);
  Tensor y = result(rows.codes.dim(0), w_.rows, x.codes.device(), WriteAs::Operand);
  packed_on(y).packed_gated_rows(y, rows, w_, up.w_);
  return reshape(y, shape_behind(x, w_));
}

std::shared_ptr<PackedWeight> PackedIntWeight::on_device(Device device) const {
  if (w_.data.device() == device) return std::make_shared<PackedIntWeight>(w_);
  PackedInt raw = w_, moved;
  check(w_.data.device().type == DeviceType::CPU,
        "packed weight: on {}, and moves from the CPU alone", to_string(w_.data.device()));
  raw.data = to(w_.data, device);
  packed_on(raw.data).packed_arrange(moved, raw);
  return moved.data.defined() ? std::make_shared<PackedIntWeight>(std::move(moved)) : nullptr;
}

Tensor PackedIntWeight::dequantize() const {
  Tensor y = Tensor::empty({w_.rows, w_.cols}, DType::F32, w_.data.device());
  packed_on(w_.data).packed_dequantize(y, w_);
  return y;
}

Tensor PackedIntWeight::embedding(const Tensor& ids) const {
  Shape shape = ids.shape();
  shape.push_back(w_.cols);
  Tensor y = Tensor::empty({ids.numel(), w_.cols}, DType::F32, ids.device());
  packed_on(ids).packed_embedding(y, w_, reshape(ids, {-1}));
  return reshape(y, shape);
}

double PackedIntWeight::bits_per_weight() const {
  return 8.0 * static_cast<double>(nbytes()) / static_cast<double>(w_.rows * w_.cols);
}

std::shared_ptr<PackedWeight> packed_int_weight(Tensor data, int64_t rows, int64_t cols,
                                                GroupSpec spec) {
  PackedInt w{std::move(data), rows, cols, spec};
  check(w.data.dtype() == DType::U8 && w.data.nbytes() == static_cast<size_t>(w.nbytes()),
        "packed weight [{}, {}] at {} bits, groups of {}: {} {} stored, {} bytes of U8 wanted",
        rows, cols, spec.bits, spec.group_cols(cols), dtype_name(w.data.dtype()), w.data.shape(),
        w.nbytes());
  return std::make_shared<PackedIntWeight>(std::move(w));
}

}  // namespace omq::nn
