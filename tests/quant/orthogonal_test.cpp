// Hadamard matrices of every order that the sizes of models ask for, random orthogonal ones, and
// how a size is divided.
#include "quant/orthogonal.h"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "autograd/ops.h"
#include "tests/models/files.h"
#include "tests/support/close.h"

namespace omq::quant {
namespace {

// The largest entry of |M·Mᵀ − s·I|.
double from_orthogonal(const Tensor& m, double s) {
  const std::vector<double> g = values(matmul(m, transpose(m, 0, 1)));
  const auto n = static_cast<size_t>(m.dim(0));
  double worst = 0;
  for (size_t i = 0; i < g.size(); ++i)
    worst = std::max(worst, std::abs(g[i] - (i / n == i % n ? s : 0)));
  return worst;
}

double largest(const Tensor& m) {
  double x = 0;
  for (const double v : values(m)) x = std::max(x, std::abs(v));
  return x;
}

}  // namespace

TEST_CASE("orthogonal: every Hadamard matrix that is constructed is one, to the last bit") {
  int count = 0;
  for (int64_t n = 1; n <= 200; ++n) {
    if (!hadamard_exists(n)) continue;
    CAPTURE(n);
    ++count;
    const Tensor h = hadamard(n);
    for (const double x : values(h)) REQUIRE(std::abs(x) == 1);
    CHECK(from_orthogonal(h, static_cast<double>(n)) == 0);
  }
  CHECK(count == 44);
  for (const int64_t n : {1,  2,  4,  8,  12, 16, 20, 24,  28,  32,  36,  40,  44,  48,  56,
                          60, 64, 72, 76, 80, 84, 96, 108, 112, 128, 140, 144, 148, 160, 192})
    CHECK(hadamard_exists(n));
  for (const int64_t n : {0, 3, 6, 9, 10, 14, 18, 86, 172}) {
    CHECK_FALSE(hadamard_exists(n));
    CHECK(contains(message_of([n] { hadamard(n); }), "hadamard: none of order"));
  }
}

TEST_CASE("orthogonal: random matrices are orthogonal, and each seed has its own") {
  for (const int64_t n : {1, 2, 3, 9, 43, 128}) {
    CAPTURE(n);
    const Tensor m = random_orthogonal(n, Philox(1));
    CHECK(from_orthogonal(m, 1) < 1e-13);
    CHECK(bit_equal(m, random_orthogonal(n, Philox(1))));
    if (n > 1) CHECK_FALSE(bit_equal(m, random_orthogonal(n, Philox(2))));
  }
  // Uniform over the sphere: the mean square of an entry is 1/n, with either sign.
  double sum = 0, square = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const double x = random_orthogonal(4, Philox(seed)).data<double>()[5];
    sum += x / 2000, square += x * x / 2000;
  }
  CHECK(std::abs(sum) < 0.05);
  CHECK(std::abs(square - 0.25) < 0.03);
}

TEST_CASE("orthogonal: factors are Hadamard, or blocks of one times a random matrix") {
  for (const int64_t n : {1, 2, 3, 6, 9, 12, 16, 18, 20, 36, 43, 48, 86, 128}) {
    CAPTURE(n);
    const Tensor m = orthogonal_factor(n, Philox(3));
    CHECK(from_orthogonal(m, 1) < 1e-13);
    const double flat = 1 / std::sqrt(static_cast<double>(n));
    if (hadamard_exists(n)) CHECK(std::abs(largest(m) - flat) < 1e-15);
  }
  // 6 = 2·3: the matrix of 3 twice in every row, divided by √2, once with the other sign.
  const std::vector<double> m = values(orthogonal_factor(6, Philox(3)));
  for (size_t i = 0; i < 3; ++i)
    for (size_t j = 0; j < 3; ++j) {
      CHECK(m[i * 6 + j] == m[i * 6 + 3 + j]);
      CHECK(m[(i + 3) * 6 + j] == -m[(i + 3) * 6 + 3 + j]);
    }
}

TEST_CASE("orthogonal: sizes of models are divided so that little is left to do") {
  struct Case {
    int64_t n, left, right;
  };
  for (const Case& c : {Case{576, 16, 36},
                        {1536, 32, 48},
                        {64, 8, 8},
                        {128, 8, 16},
                        {4096, 64, 64},
                        {5120, 64, 80},
                        {11008, 128, 86},
                        {13824, 128, 108},
                        {14336, 128, 112},
                        {28672, 128, 224},
                        {3584, 64, 56},
                        {18944, 128, 148},
                        {896, 32, 28},
                        {2, 0, 2},
                        {9, 0, 9},
                        {96, 8, 12},
                        {288, 8, 36},
                        {80, 4, 20}}) {
    CAPTURE(c.n);
    const FactorSizes s = factor_sizes(c.n);
    CHECK(s.left == c.left);
    CHECK(s.right == c.right);
  }
  CHECK(contains(message_of([] { factor_sizes(1); }), "rows of 1"));
}

TEST_CASE("orthogonal: a transform keeps lengths and spreads one large entry over the row") {
  for (const int64_t n : {576, 1536, 64, 9, 11008}) {
    CAPTURE(n);
    const nn::Kronecker k = orthogonal_kronecker(n, Philox(5));
    Tensor x = Tensor::zeros({2, n}, DType::F64);
    x.data<double>()[n / 3] = 1;
    x.data<double>()[n + n / 2] = -3;
    const std::vector<double> y = values(k(x));
    double first = 0, second = 0, most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double a = y[static_cast<size_t>(i)], b = y[static_cast<size_t>(n + i)];
      first += a * a, second += b * b, most = std::max(most, std::abs(a));
    }
    CHECK(std::abs(first - 1) < 1e-12);
    CHECK(std::abs(second - 9) < 1e-11);
    const double flat = 1 / std::sqrt(static_cast<double>(n));
    const bool hadamard_only = n == 576 || n == 1536 || n == 64;
    CHECK(most < (hadamard_only ? 1.0001 : 4.5) * flat);
  }
}

}  // namespace omq::quant
