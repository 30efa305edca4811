// Grids by the squared error of the weights themselves (the search of GPTQ's and QuaRot's codes;
// spec transform-methods §6.3): of both ends of a group's range the share s that leaves the least
// Σ (ŵ − w)², s = 1, 0.98, … 0.5. Nothing is learned and no text is looked at.
#include <algorithm>
#include <limits>
#include <vector>

#include "autograd/ops.h"
#include "quant/clip.h"

namespace omq::quant {
namespace {

constexpr int kSteps = 25;  // of 0.02

class SearchedClip final : public Clip {
 public:
  SearchedClip(GroupSpec spec, GridRule rule) : spec_(spec), rule_(rule) {}

  Grid grid(const Tensor& w) const override {
    const Range range = group_range(w, spec_);
    const Tensor share = best_share(w.detach(), {range.hi.detach(), range.lo.detach()});
    return rule_(share * range.hi, share * range.lo, spec_);
  }

 private:
  // [rows, groups]
  Tensor best_share(const Tensor& w, const Range& range) const {
    NoGrad off;
    const auto n = static_cast<size_t>(range.hi.numel());
    std::vector<double> best(n, 1), least(n, std::numeric_limits<double>::infinity());
    for (int step = 0; step <= kSteps; ++step) {
      const double share = 1 - 0.02 * step;
      const Grid g = rule_(range.hi * share, range.lo * share, spec_);
      const std::vector<double> errors =
          group_sums(square(fake_quant(w, g.scale, g.zero, spec_) - w));
      for (size_t i = 0; i < n; ++i)
        if (errors[i] < least[i]) least[i] = errors[i], best[i] = share;
    }
    const std::vector<float> shares(best.begin(), best.end());
    return to(to(Tensor::from<float>(shares, range.hi.shape()), w.dtype()), w.device());
  }

  // Of every row and group of x [rows, cols]: [rows, groups]
  std::vector<double> group_sums(const Tensor& x) const {
    const int64_t rows = x.dim(0), cols = x.dim(1), groups = spec_.groups(cols),
                  width = spec_.group_cols(cols);
    std::vector<double> all(static_cast<size_t>(rows * groups));
    for (int64_t g = 0; g < groups; ++g) {
      const Tensor part = slice(x, 1, g * width, std::min(cols, (g + 1) * width));
      const Tensor sums = to(sum_to(part, {rows, 1}), DType::F32);
      const std::vector<float> of_rows = sums.to_vector<float>();
      for (int64_t r = 0; r < rows; ++r)
        all[static_cast<size_t>(r * groups + g)] = of_rows[static_cast<size_t>(r)];
    }
    return all;
  }

  GroupSpec spec_;
  GridRule rule_;
};

}  // namespace

std::unique_ptr<Clip> searched_clip(const Tensor&, GroupSpec spec, GridRule rule) {
  return std::make_unique<SearchedClip>(spec, rule);
}

}  // namespace omq::quant
