// PackedWeight: a weight matrix that is stored in few bits and multiplied as it is.
//
// Virtual, not a closed list: a new format (signs, codebooks) is a new class here, and Linear does
// not change.
#pragma once

#include <functional>
#include <memory>
#include <string_view>

#include "autograd/ops.h"
#include "tensor/packed.h"
#include "tensor/row_quant.h"

namespace omq::nn {

using VisitFn = std::function<void(std::string_view name, Tensor& tensor)>;

struct PackedWeight {
  virtual ~PackedWeight() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t cols() const = 0;
  // x [..., cols] → [..., rows], no gradient; `write` as in linear() of autograd/ops.h.
  virtual Tensor matmul(const Tensor& x, WriteAs write) const = 0;
  // The same of codes, one a byte; here: of the floats that they stand for.
  virtual Tensor matmul(const QuantizedRows& x, WriteAs write) const;
  virtual Tensor dequantize() const = 0;                  // F32 [rows, cols]
  virtual Tensor embedding(const Tensor& ids) const = 0;  // I32 [...] → F32 [..., cols]
  // The same weight on a device; null where that has no form for it.
  virtual std::shared_ptr<PackedWeight> on_device(Device device) const = 0;
  virtual size_t nbytes() const = 0;           // stored bytes, grids included
  virtual double bits_per_weight() const = 0;  // 8 · nbytes / (rows · cols)
  virtual void visit(const VisitFn& v) = 0;    // ("packed", data)
};

// Whether a product of so many rows without a gradient writes F16: a GPU multiplies many rows in it
// (kFewRows), and the caller's ComputeScope must be of the same type.
bool halves_wanted(int64_t rows, Device device, WriteAs write);

// Integer codes on a uniform grid, in the panel16 layout of tensor/packed.h.
class PackedIntWeight final : public PackedWeight {
 public:
  explicit PackedIntWeight(PackedInt w) : w_(std::move(w)) {}
  int64_t rows() const override { return w_.rows; }
  int64_t cols() const override { return w_.cols; }
  Tensor matmul(const Tensor& x, WriteAs write) const override;
  // In integers, unless zero points of x need not be codes (RowQuant::include_zero).
  Tensor matmul(const QuantizedRows& x, WriteAs write) const override;
  // silu(x · thisᵀ) ⊙ (x · upᵀ), F16, of many rows on a GPU; undefined where integers do not do it.
  Tensor gated(const QuantizedRows& x, const PackedIntWeight& up) const;
  Tensor dequantize() const override;
  Tensor embedding(const Tensor& ids) const override;
  std::shared_ptr<PackedWeight> on_device(Device device) const override;
  size_t nbytes() const override { return static_cast<size_t>(w_.nbytes()); }
  double bits_per_weight() const override;
  void visit(const VisitFn& v) override { v("packed", w_.data); }
  const PackedInt& packed() const { return w_; }

 private:
  PackedInt w_;
};

// A stored tensor NAME.packed (U8 [panels, panel bytes]) as a weight. Throws Error when the size
// does not fit.
std::shared_ptr<PackedWeight> packed_int_weight(Tensor data, int64_t rows, int64_t cols,
                                                GroupSpec spec);

}  // namespace omq::nn
