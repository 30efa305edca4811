// Objectives.
#include "quant/objective.h"

#include "autograd/ops.h"

namespace omq::quant {

namespace {

// y, target: [B,T,D].
Tensor block_error(const Tensor& y, const Tensor& target, TokenWeight w) {
  if (w == TokenWeight::Equal) return mse(y, target);
  constexpr double kSmallest = 1e-12;  // a mean square, against a division by zero
  Shape one_a_token = target.shape();
  one_a_token[one_a_token.n - 1] = 1;
  const Tensor squares =
      sum_to(square(target), one_a_token) / static_cast<double>(target.dim(-1)) + kSmallest;
  const Tensor root = exp(log(squares) * -0.25);  // of the weight 1 / √squares
  return mse(y * root, target * root);
}

}  // namespace

Objective block_mse(TokenWeight w) {
  return {[w](const Tensor& y, const Targets& t) { return block_error(y, t.of_fp, w); }, false, w};
}

Objective augmented_mse(double weight, TokenWeight w) {
  return {[weight, w](const Tensor& y, const Targets& t) {
            const Tensor added = block_error(y, t.of_quant, w);
            return block_error(y, t.of_fp, w) + (weight == 1 ? added : added * weight);
          },
          true, w};
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
