// Shares of a range (SignRound; spec weight-methods §10):
//
//   h = (a·max W − b·min W) / (2ᵇ−1),  z = ⌊−b·min W / h⌉,  a, b ∈ [0, 1] learned, from 1
//
// h is the f16 value that will be stored, so that a and b are learned for it.
#include "autograd/compute.h"
#include "autograd/ops.h"
#include "quant/clip.h"
#include "tensor/lwc_grid.h"

namespace omq::quant {
namespace {

class ScaledRange final : public Clip {
 public:
  ScaledRange(const Tensor& w, GroupSpec spec) : spec_(spec) {
    NoGrad off;
    spec_.include_zero = true;  // zero points are codes
    const Shape grid{w.dim(0), spec.groups(w.dim(1))};
    upper_ = parameter(Tensor::full(grid, 1, wide_dtype(w.dtype()), w.device()));
    lower_ = parameter(Tensor::full(grid, 1, wide_dtype(w.dtype()), w.device()));
  }

  Grid grid(const Tensor& w) const override {
    const Range r = group_range(w, spec_);
    const Tensor hi = clamp(upper_, 0, 1) * r.hi, lo = clamp(lower_, 0, 1) * r.lo;
    const Grid exact = affine_grid(hi, lo, spec_);
    const Tensor h = exact.scale.detach();
    const Tensor scale = straight_through(exact.scale, to(to(h, DType::F16), h.dtype()));
    if (spec_.symmetric) return {scale, exact.zero};
    return {scale, straight_through(-lo / exact.scale, exact.zero)};
  }

  Tensor on_grid(const Tensor& w, const Grid& grid, GroupSpec spec) const override {
    spec.zero_learns = !spec_.symmetric;
    spec.end_codes_learn = true;
    return fake_quant(w, grid.scale, grid.zero, spec);
  }

  nn::ParamGroup params() const override {
    return {.name = "range", .params = {upper_, lower_}, .names = {"upper_share", "lower_share"}};
  }

 private:
  GroupSpec spec_;
  Tensor upper_, lower_;  // a, b: [rows, groups]
};

}  // namespace

std::unique_ptr<Clip> scaled_range(const Tensor& w, GroupSpec spec) {
  return std::make_unique<ScaledRange>(w, spec);
}

}  // namespace omq::quant
