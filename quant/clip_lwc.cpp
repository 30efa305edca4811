// Learnable Weight Clipping, Eq. 2 of arXiv 2308.13137v3:
//
//   h = (γ·max W − β·min W) / (2ᵇ−1),  z = −⌊β·min W / h⌉,  γ = σ(u), β = σ(l) ∈ (0, 1)
//
// u and l are learned per row and group; max and min are of the weight as it is now, so the factors
// follow whatever a transform does to it. A constant weight's range is taken once.
#include "autograd/ops.h"
#include "quant/clip.h"

namespace omq::quant {
namespace {

class LearnedClip final : public Clip {
 public:
  LearnedClip(const Tensor& w, GroupSpec spec, LearnedClipOptions options)
      : spec_(spec), rule_(options.rule) {
    NoGrad off;
    source_ = w.detach();
    range_ = group_range(w, spec);
    gamma_logit_ =
        parameter(Tensor::full(range_.hi.shape(), options.logit, range_.hi.dtype(), w.device()));
    beta_logit_ =
        parameter(Tensor::full(range_.hi.shape(), options.logit, range_.hi.dtype(), w.device()));
  }

  Grid grid(const Tensor& w) const override {
    const Range r = is_source(w) ? range_ : group_range(w, spec_);
    if (in_one_kernel()) {
      const ScaleZero g = lwc_grid(gamma_logit_, beta_logit_, r.hi, r.lo, spec_);
      return {g.scale, g.zero};
    }
    return rule_(sigmoid(gamma_logit_) * r.hi, sigmoid(beta_logit_) * r.lo, spec_);
  }

  Tensor quantized(const Tensor& w, GroupSpec spec) const override {
    if (is_source(w) || !in_one_kernel()) return Clip::quantized(w, spec);
    return fake_quant_lwc(w, gamma_logit_, beta_logit_, spec);
  }

  nn::ParamGroup params() const override {
    return {.name = "lwc",
            .params = {gamma_logit_, beta_logit_},
            .names = {"gamma_logit", "beta_logit"}};
  }

 private:
  bool is_source(const Tensor& w) const { return !needs_grad(w) && w.raw() == source_.raw(); }
  bool in_one_kernel() const { return rule_ == affine_grid && !spec_.symmetric; }

  GroupSpec spec_;
  GridRule rule_;
  Tensor source_;  // holds the storage, so that its address stays a proof of identity
  Range range_;
  Tensor gamma_logit_, beta_logit_;  // u, l: [rows, groups]
};

}  // namespace

std::unique_ptr<Clip> learned_clip(const Tensor& w, GroupSpec spec, LearnedClipOptions options) {
  return std::make_unique<LearnedClip>(w, spec, options);
}

}  // namespace omq::quant
