// Free scale and zero point (EfficientQAT; spec weight-methods §1):
//
//   q = clamp(⌊w/s⌉ + ⌊z⌉, 0, 2ᵇ−1),  ŵ = (q − ⌊z⌉)·s
//
//                inside                 below    above
//   ∂ŵ/∂s        ⌊w/s⌉ − w/s            −z       2ᵇ−1 − z
//   ∂ŵ/∂z        0                      −s       −s
//   ∂ŵ/∂w        1                      0        0
#include "autograd/ops.h"
#include "quant/clip.h"
#include "tensor/lwc_grid.h"

namespace omq::quant {
namespace {

class FreeGrid final : public Clip {
 public:
  FreeGrid(const Tensor& w, GroupSpec spec) : spec_(spec) {
    NoGrad off;
    GroupSpec with_zero = spec;  // zero points are codes
    with_zero.include_zero = true;
    const Range range = group_range(w.detach(), with_zero);
    const Grid start = affine_grid(range.hi, range.lo, with_zero);
    step_ = parameter(start.scale);
    if (!spec.symmetric) zero_ = parameter(-range.lo / start.scale);
  }

  Grid grid(const Tensor&) const override {
    const Tensor h = step_.detach();
    const Tensor scale = straight_through(step_, clamp(h, kScaleFloor, kScaleCeiling));
    if (spec_.symmetric)
      return {scale, Tensor::full(h.shape(), 1 << (spec_.bits - 1), h.dtype(), h.device())};
    return {scale, straight_through(zero_, clamp(round(zero_.detach()), 0, spec_.max_code()))};
  }

  Tensor on_grid(const Tensor& w, const Grid& grid, GroupSpec spec) const override {
    spec.zero_learns = !spec_.symmetric;
    spec.end_codes_learn = true;
    return fake_quant(w, grid.scale, grid.zero, spec);
  }

  nn::ParamGroup params() const override {
    if (spec_.symmetric) return {.name = "grid", .params = {step_}, .names = {"step"}};
    return {.name = "grid", .params = {step_, zero_}, .names = {"step", "zero_point"}};
  }

 private:
  GroupSpec spec_;
  Tensor step_, zero_;  // s, z: [rows, groups]; z is not rounded
};

}  // namespace

std::unique_ptr<Clip> free_grid(const Tensor& w, GroupSpec spec) {
  return std::make_unique<FreeGrid>(w, spec);
}

}  // namespace omq::quant
