// Learnable Weight Clipping, Eq. 2 of arXiv 2308.13137v3:
//
//   h = (γ·max W − β·min W) / (2ᵇ−1),  z = −⌊β·min W / h⌉,  γ = σ(u), β = σ(l) ∈ (0, 1)
//
// u and l are learned per row and group; max and min are of the weight as it is now, so the factors
// follow whatever a transform does to it. A constant weight's range is taken once.
#include <algorithm>
#include <cmath>
#include <limits>

#include "autograd/ops.h"
#include "quant/clip.h"

namespace omq::quant {
namespace {

constexpr int kShrinks = 9;  // in the search: 0.95, 0.90, … 0.55

void fill(const Tensor& parameter, const std::vector<float>& values) {
  transfer(parameter.detach(), Tensor::from<float>(values, parameter.shape()));
}

// Σ over tokens of (x · (ŵ − w)ᵀ)², each group by itself: [rows, groups]
std::vector<float> output_errors(const Tensor& x, const Tensor& error, GroupSpec spec) {
  const int64_t rows = error.dim(0), cols = error.dim(1), groups = spec.groups(cols);
  std::vector<float> all(static_cast<size_t>(rows * groups));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * spec.group_cols(cols),
                  end = std::min(cols, begin + spec.group_cols(cols));
    const Tensor y = linear(slice(x, 1, begin, end), slice(error, 1, begin, end));
    const std::vector<float> part = sum_to(square(y), {1, rows}).to_vector<float>();
    for (int64_t r = 0; r < rows; ++r)
      all[static_cast<size_t>(r * groups + g)] = part[static_cast<size_t>(r)];
  }
  return all;
}

class LearnedClip final : public Clip {
 public:
  LearnedClip(const Tensor& w, GroupSpec spec, LearnedClipOptions options)
      : spec_(spec), options_(options) {
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
    return options_.rule(sigmoid(gamma_logit_) * r.hi, sigmoid(beta_logit_) * r.lo, spec_);
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

  bool starts_from_inputs() const override { return options_.search; }

  void start(const Tensor& w, const Tensor& x) override {
    if (!options_.search) return;
    NoGrad off;
    const auto n = static_cast<size_t>(gamma_logit_.numel());
    std::vector<float> best(n), least(n, std::numeric_limits<float>::infinity());
    for (int step = 0; step <= kShrinks; ++step) {
      const double share = 1 - 0.05 * step;
      const auto logit =
          static_cast<float>(step == 0 ? options_.logit : std::log(share / (1 - share)));
      both(std::vector<float>(n, logit));
      const Grid g = grid(w);
      const auto errors =
          output_errors(x, fake_quant(w, g.scale, g.zero, spec_) - w.detach(), spec_);
      for (size_t i = 0; i < n; ++i)
        if (errors[i] < least[i]) least[i] = errors[i], best[i] = logit;
    }
    for (size_t i = 0; i < n; ++i)
      if (least[i] == std::numeric_limits<float>::infinity())
        best[i] = static_cast<float>(options_.logit);
    both(best);
  }

 private:
  void both(const std::vector<float>& logits) {
    fill(gamma_logit_, logits);
    fill(beta_logit_, logits);
  }

  bool is_source(const Tensor& w) const { return !needs_grad(w) && w.raw() == source_.raw(); }
  bool in_one_kernel() const { return options_.rule == affine_grid && !spec_.symmetric; }

  GroupSpec spec_;
  LearnedClipOptions options_;
  Tensor source_;  // holds the storage, so that its address stays a proof of identity
  Range range_;
  Tensor gamma_logit_, beta_logit_;  // u, l: [rows, groups]
};

}  // namespace

std::unique_ptr<Clip> learned_clip(const Tensor& w, GroupSpec spec, LearnedClipOptions options) {
  return std::make_unique<LearnedClip>(w, spec, options);
}

}  // namespace omq::quant
