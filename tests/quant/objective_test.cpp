// Objectives against their formulas, and their gradients.
#include "quant/objective.h"

#include <doctest/doctest.h>

#include <cmath>

#include "autograd/ops.h"
#include "tests/support/gradcheck.h"
#include "tests/support/property.h"

namespace omq::quant {
namespace {

constexpr int64_t kWindows = 2, kTokens = 3, kWidth = 8;

// Tokens of very different sizes; one is all zeros.
Tensor some_tokens(Rng& rng) {
  Tensor x = normal_tensor(rng, {kWindows, kTokens, kWidth}, DType::F64);
  for (int64_t i = 0; i < kWidth; ++i) {
    x.data<double>()[i] *= 1000;
    x.data<double>()[kWidth + i] = 0;
    x.data<double>()[2 * kWidth + i] *= 1e-3;
  }
  return x;
}

double weighted_error(const Tensor& y, const Tensor& t) {
  double sum = 0;
  for (int64_t row = 0; row < kWindows * kTokens; ++row) {
    double error = 0, size = 0;
    for (int64_t i = row * kWidth; i < (row + 1) * kWidth; ++i) {
      error += std::pow(y.data<double>()[i] - t.data<double>()[i], 2);
      size += std::pow(t.data<double>()[i], 2);
    }
    sum += error / kWidth / std::sqrt(size / kWidth + 1e-12);
  }
  return sum / (kWindows * kTokens);
}

TEST_CASE("objective: tokens count by the inverse of their size") {
  Rng rng(1);
  const Targets t{some_tokens(rng), some_tokens(rng)};
  const Tensor y = t.of_fp + normal_tensor(rng, t.of_fp.shape(), DType::F64, 0.1);
  const double fp = weighted_error(y, t.of_fp), of_quant = weighted_error(y, t.of_quant);
  CHECK(block_mse(TokenWeight::InverseSize).loss(y, t).item<double>() == doctest::Approx(fp));
  CHECK(augmented_mse(0.25, TokenWeight::InverseSize).loss(y, t).item<double>() ==
        doctest::Approx(fp + 0.25 * of_quant));
  CHECK(block_mse().loss(y, t).item<double>() == doctest::Approx(mse(y, t.of_fp).item<double>()));
  // An error as large in proportion counts by the token's size.
  const auto share = [&](double of) {
    Tensor off = contiguous(t.of_fp * 1.0);
    const int64_t row = of > 1 ? 0 : 2;
    for (int64_t i = row * kWidth; i < (row + 1) * kWidth; ++i) off.data<double>()[i] *= 1.01;
    return block_mse(TokenWeight::InverseSize).loss(off, t).item<double>();
  };
  CHECK(share(1000) / share(1e-3) > 1e5);
  CHECK(share(1000) / share(1e-3) < 1e7);
}

TEST_CASE("objective: gradients of a weighted error") {
  Rng rng(2);
  const Targets t{some_tokens(rng), {}};
  const Tensor y = t.of_fp + normal_tensor(rng, t.of_fp.shape(), DType::F64, 0.1);
  const auto loss = [&](const std::vector<Tensor>& in) {
    return block_mse(TokenWeight::InverseSize).loss(in[0], t);
  };
  CHECK(gradcheck(loss, {y}));
}

}  // namespace
}  // namespace omq::quant
