// Objectives.
#include "quant/objective.h"

#include "autograd/ops.h"

namespace omq::quant {

Objective block_mse() {
  return {[](const Tensor& y, const Targets& t) { return mse(y, t.of_fp); }, false};
}

Objective augmented_mse(double weight) {
  return {[weight](const Tensor& y, const Targets& t) {
            const Tensor added = mse(y, t.of_quant);
            return mse(y, t.of_fp) + (weight == 1 ? added : added * weight);
          },
          true};
}

namespace {

struct Moments {
  Tensor mean, variance;  // [1, D]
};
Moments over_tokens(const Tensor& y) {
  const Tensor rows = reshape(y, {-1, y.dim(-1)});
  const auto average = [&rows](const Tensor& x) {
    return sum_to(x, {1, x.dim(1)}) / static_cast<double>(rows.dim(0));
  };
  const Tensor m = average(rows);
  return {m, average(square(rows - m))};
}

}  // namespace

Objective channel_statistics() {
  return {[](const Tensor& y, const Targets& t) {
            const Moments got = over_tokens(y), wanted = over_tokens(t.of_fp);
            return mean(abs(got.mean - wanted.mean) + abs(got.variance - wanted.variance));
          },
          false};
}

}  // namespace omq::quant
