// Grids from ranges, and the clip that learns nothing.
#include "autograd/ops.h"
#include "quant/clip.h"

namespace omq::quant {

namespace {

constexpr double kScaleFloor = 1e-5, kScaleCeiling = 1e4;

struct MinMaxClip final : Clip {
  explicit MinMaxClip(GroupSpec s) : spec(s) {}
  Grid grid(const Tensor& w) const override {
    const Range range = group_range(w, spec);
    return affine_grid(range.hi, range.lo, spec);
  }
  GroupSpec spec;
};

}  // namespace

Grid affine_grid(const Tensor& hi, const Tensor& lo, GroupSpec spec) {
  if (spec.symmetric) {
    // The whole code range 0 … 2ᵇ−1 around 2ᵇ⁻¹ reaches from −2ᵇ⁻¹ to 2ᵇ⁻¹−1 steps; half a step
    // less on either side splits the difference between clipping the top and wasting the bottom.
    const double reach = static_cast<double>(1 << (spec.bits - 1)) - 0.5;
    const Tensor h = clamp(maximum(hi, -lo) / reach, kScaleFloor, kScaleCeiling);
    return {h, Tensor::full(h.shape(), 1 << (spec.bits - 1), h.dtype(), h.device())};
  }
  const double levels = spec.max_code();
  const Tensor h = clamp((hi - lo) / levels, kScaleFloor, kScaleCeiling);
  return {h, clamp(round(-lo.detach() / h.detach()), 0, levels)};
}

std::unique_ptr<Clip> minmax_clip(const Tensor&, GroupSpec spec) {
  return std::make_unique<MinMaxClip>(spec);
}

}  // namespace omq::quant
