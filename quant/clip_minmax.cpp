// Grids from ranges, and the clip that learns nothing.
#include "autograd/ops.h"
#include "quant/clip.h"
#include "tensor/lwc_grid.h"

namespace omq::quant {

Tensor Clip::quantized(const Tensor& w, GroupSpec spec) const { return on_grid(w, grid(w), spec); }

namespace {

struct MinMaxClip final : Clip {
  MinMaxClip(GroupSpec s, GridRule r) : spec(s), rule(r) {}
  Grid grid(const Tensor& w) const override {
    const Range range = group_range(w, spec);
    return rule(range.hi, range.lo, spec);
  }
  GroupSpec spec;
  GridRule rule;
};

}  // namespace

Tensor Clip::on_grid(const Tensor& w, const Grid& grid, GroupSpec spec) const {
  return fake_quant(w, grid.scale, grid.zero, spec);
}

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
  const Tensor z = -lo.detach() / h.detach();
  if (!spec.include_zero) return {h, round(clamp(z, -kZeroLimit, kZeroLimit))};
  return {h, clamp(round(z), 0, levels)};
}

Grid official_symmetric_grid(const Tensor& hi, const Tensor& lo, GroupSpec spec) {
  const int middle = (1 << (spec.bits - 1)) - 1;
  const Tensor h =
      clamp(maximum(abs(hi), abs(lo)) / static_cast<double>(middle), kScaleFloor, kScaleCeiling);
  return {h, Tensor::full(h.shape(), middle, h.dtype(), h.device())};
}

std::unique_ptr<Clip> minmax_clip(const Tensor&, GroupSpec spec, GridRule rule) {
  return std::make_unique<MinMaxClip>(spec, rule);
}

}  // namespace omq::quant
