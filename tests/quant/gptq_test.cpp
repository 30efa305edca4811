// The column solver against the textbook form in F64 (H⁻¹ by elimination, its Cholesky factor, one
// column after the other over the whole matrix), and what it is for: smaller errors of outputs.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "autograd/ops.h"
#include "quant/rounder.h"
#include "tensor/parallel.h"
#include "tests/support/close.h"
#include "tests/support/property.h"

namespace omq::quant {
namespace {

using Matrix = std::vector<std::vector<double>>;

Matrix matrix_of(const Tensor& t) {
  const std::vector<double> v = values(t);
  const auto rows = static_cast<size_t>(t.dim(0)), cols = static_cast<size_t>(t.dim(1));
  Matrix m(rows, std::vector<double>(cols));
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < cols; ++c) m[r][c] = v[r * cols + c];
  return m;
}

// Gauss–Jordan with pivoting.
Matrix inverse(Matrix a) {
  const size_t n = a.size();
  Matrix b(n, std::vector<double>(n));
  for (size_t i = 0; i < n; ++i) b[i][i] = 1;
  for (size_t c = 0; c < n; ++c) {
    size_t p = c;
    for (size_t r = c; r < n; ++r)
      if (std::abs(a[r][c]) > std::abs(a[p][c])) p = r;
    std::swap(a[c], a[p]);
    std::swap(b[c], b[p]);
    const double pivot = a[c][c];
    for (size_t k = 0; k < n; ++k) a[c][k] /= pivot, b[c][k] /= pivot;
    for (size_t r = 0; r < n; ++r) {
      if (r == c) continue;
      const double f = a[r][c];
      for (size_t k = 0; k < n; ++k) a[r][k] -= f * a[c][k], b[r][k] -= f * b[c][k];
    }
  }
  return b;
}

// U upper triangular with UᵀU = a.
Matrix upper_cholesky(const Matrix& a) {
  const size_t n = a.size();
  Matrix u(n, std::vector<double>(n));
  for (size_t i = 0; i < n; ++i)
    for (size_t j = i; j < n; ++j) {
      double s = a[i][j];
      for (size_t k = 0; k < i; ++k) s -= u[k][i] * u[k][j];
      u[i][j] = i == j ? std::sqrt(s) : s / u[i][i];
    }
  return u;
}

// Spec weight-methods §10, word by word.
std::vector<int> textbook(const Tensor& weight, const Grid& grid, GroupSpec spec,
                          const Tensor& hessian, const GptqOptions& o) {
  Matrix w = matrix_of(weight), h = matrix_of(hessian);
  const Matrix scale = matrix_of(grid.scale), zero = matrix_of(grid.zero);
  const size_t rows = w.size(), n = h.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  if (o.act_order)
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return h[a][a] > h[b][b]; });
  double mean = 0;
  for (size_t i = 0; i < n; ++i) mean += h[i][i] / static_cast<double>(n);
  Matrix sorted = h;
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j) sorted[i][j] = h[order[i]][order[j]];
  for (size_t i = 0; i < n; ++i)
    sorted[i][i] = sorted[i][i] > 0 ? sorted[i][i] + o.damping * mean : 1;
  const Matrix u = upper_cholesky(inverse(sorted));
  std::vector<int> codes(rows * n);
  for (size_t i = 0; i < n; ++i) {
    const size_t column = order[i];
    const auto g = static_cast<size_t>(static_cast<int64_t>(column) /
                                       spec.group_cols(static_cast<int64_t>(n)));
    for (size_t r = 0; r < rows; ++r) {
      const double q = std::clamp(std::nearbyint(w[r][column] / scale[r][g]) + zero[r][g], 0.0,
                                  static_cast<double>(spec.max_code()));
      codes[r * n + column] = static_cast<int>(q);
      const double e = (w[r][column] - (q - zero[r][g]) * scale[r][g]) / u[i][i];
      for (size_t j = i; j < n; ++j) w[r][order[j]] -= e * u[i][j];
    }
  }
  return codes;
}

std::vector<int> codes_of(const Tensor& w, const Grid& g, GroupSpec s, const Tensor& h,
                          const GptqOptions& o = {}) {
  std::vector<int> out;
  for (const uint8_t c : round_gptq(o)->codes(w, g, s, h).to_vector<uint8_t>()) out.push_back(c);
  return out;
}

// Inputs of few directions and very different sizes, as those of a model are: [tokens, cols].
Tensor correlated_inputs(Rng& rng, int64_t tokens, int64_t cols) {
  const int64_t rank = std::max<int64_t>(1, cols / 4);
  const Tensor x = matmul(normal_tensor(rng, {tokens, rank}), normal_tensor(rng, {rank, cols})) +
                   normal_tensor(rng, {tokens, cols}) * 0.3;
  Tensor size = Tensor::empty({1, cols}, DType::F64);
  for (int64_t i = 0; i < cols; ++i) size.data<double>()[i] = std::exp(rng.uniform(-1.5, 1.5));
  return x * size;
}
Tensor products(const Tensor& x) {
  return matmul(transpose(x, 0, 1), x) * (2.0 / static_cast<double>(x.dim(0)));
}

struct Problem {
  Tensor w, x, hessian;  // F32, F64, F64
  GroupSpec spec;
  Grid grid;
  Problem(Rng& rng, int64_t rows, int64_t cols, GroupSpec s)
      : w(normal_tensor(rng, {rows, cols}, DType::F32)),
        x(correlated_inputs(rng, 2 * cols, cols)),
        hessian(products(x)),
        spec(s),
        grid(minmax_clip(w, s)->grid(w)) {}
  // ‖(Ŵ − W)·Xᵀ‖²
  double error(const std::vector<int>& codes) const {
    Tensor d = converted(w, DType::F64);
    const std::vector<double> h = values(grid.scale), z = values(grid.zero);
    const int64_t cols = w.dim(1), groups = spec.groups(cols);
    for (int64_t i = 0; i < d.numel(); ++i) {
      const auto g = static_cast<size_t>(i / cols * groups + i % cols / spec.group_cols(cols));
      d.data<double>()[i] -= (codes[static_cast<size_t>(i)] - z[g]) * h[g];
    }
    return sum(square(matmul(d, transpose(x, 0, 1)))).item<double>();
  }
};

double same_share(const std::vector<int>& a, const std::vector<int>& b) {
  double same = 0;
  for (size_t i = 0; i < a.size(); ++i) same += a[i] == b[i];
  return same / static_cast<double>(a.size());
}

TEST_CASE("gptq: codes are those of the textbook form") {
  for_all(
      24, [](Rng& rng) { return rng; },
      [](Rng rng) {
        const int64_t widths[] = {1, 7, 40, 72, 128, 150};
        const int64_t cols = widths[rng.between(0, 5)];
        const GroupSpec spec{.bits = static_cast<int>(rng.between(2, 8)),
                             .group_size = rng.coin() ? 0 : 32,
                             .symmetric = rng.coin()};
        const GptqOptions o{.damping = rng.coin() ? 0.01 : 0.1, .act_order = rng.coin()};
        const Problem p(rng, rng.between(1, 20), cols, spec);
        CAPTURE(cols);
        CAPTURE(spec.bits);
        CAPTURE(o.act_order);
        const std::vector<int> want = textbook(p.w, p.grid, spec, p.hessian, o);
        CHECK(codes_of(p.w, p.grid, spec, p.hessian, o) == want);
        // In F32 a sum near a tie may fall to the other side, and what follows with it.
        const std::vector<int> narrow =
            codes_of(p.w, p.grid, spec, converted(p.hessian, DType::F32), o);
        CHECK(same_share(narrow, want) >= 0.75);
        CHECK(p.error(narrow) <= 1.02 * p.error(want) + 1e-9);
      });
}

TEST_CASE("gptq: several blocks of columns, a short last group, both orders") {
  Rng rng(5);
  for (const bool act_order : {false, true})
    for (const bool symmetric : {false, true}) {
      const GroupSpec spec{.bits = 3, .group_size = 64, .symmetric = symmetric};
      const Problem p(rng, 9, 300, spec);
      const GptqOptions o{.act_order = act_order};
      CHECK(codes_of(p.w, p.grid, spec, p.hessian, o) == textbook(p.w, p.grid, spec, p.hessian, o));
    }
}

TEST_CASE("gptq: outputs are nearer than with the nearest codes") {
  Rng rng(6);
  for (const int bits : {2, 3, 4, 8})
    for (const int64_t group : {0, 40}) {
      CAPTURE(bits);
      CAPTURE(group);
      const GroupSpec spec{.bits = bits, .group_size = group};
      const Problem p(rng, 24, 96, spec);
      std::vector<int> nearest;
      for (const uint8_t c : round_nearest()->codes(p.w, p.grid, spec, {}).to_vector<uint8_t>())
        nearest.push_back(c);
      const std::vector<int> solved = codes_of(p.w, p.grid, spec, p.hessian);
      CHECK(p.error(solved) < 0.7 * p.error(nearest));
      // Inputs that have nothing to do with each other leave nothing to make good.
      const Tensor apart = converted(Tensor::zeros({96, 96}), DType::F64);
      for (int64_t i = 0; i < 96; ++i) apart.data<double>()[i * 97] = rng.uniform(0.5, 2);
      CHECK(codes_of(p.w, p.grid, spec, apart) == nearest);
    }
}

TEST_CASE("gptq: inputs that are never anything are rounded to nearest, and change nothing") {
  Rng rng(7);
  const GroupSpec spec{.bits = 3, .group_size = 32};
  Problem p(rng, 8, 64, spec);
  for (int64_t t = 0; t < p.x.dim(0); ++t)
    for (const int64_t dead : {3, 40}) p.x.data<double>()[t * 64 + dead] = 0;
  p.hessian = products(p.x);
  const auto nearest = round_nearest()->codes(p.w, p.grid, spec, {}).to_vector<uint8_t>();
  const std::vector<int> before = codes_of(p.w, p.grid, spec, p.hessian);
  for (size_t r = 0; r < 8; ++r)
    for (const size_t dead : {3, 40}) CHECK(before[r * 64 + dead] == nearest[r * 64 + dead]);
  Problem other = p;
  other.w = converted(p.w, DType::F32);
  for (int64_t r = 0; r < 8; ++r) other.w.data<float>()[r * 64 + 40] *= 0.3f;
  const std::vector<int> after = codes_of(other.w, p.grid, spec, p.hessian);
  for (size_t i = 0; i < after.size(); ++i)
    if (i % 64 != 40) CHECK(after[i] == before[i]);
}

TEST_CASE("gptq: fewer tokens than columns; what is not positive is damped more, or refused") {
  Rng rng(8);
  const GroupSpec spec{.bits = 4};
  Problem p(rng, 6, 48, spec);
  p.x = normal_tensor(rng, {5, 48});
  p.hessian = products(p.x);
  CHECK(codes_of(p.w, p.grid, spec, p.hessian) == textbook(p.w, p.grid, spec, p.hessian, {}));
  // One eigenvalue of −0.5: damping has to grow past it.
  Tensor bent = converted(Tensor::zeros({48, 48}), DType::F64);
  for (int64_t i = 0; i < 48; ++i) bent.data<double>()[i * 49] = 1;
  bent.data<double>()[1] = bent.data<double>()[48] = 1.5;
  CHECK(codes_of(p.w, p.grid, spec, bent) ==
        textbook(p.w, p.grid, spec, bent, {.damping = 1, .act_order = true}));
  bent.data<double>()[1] = bent.data<double>()[48] = 3;
  CHECK_THROWS_WITH_AS(codes_of(p.w, p.grid, spec, bent),
                       doctest::Contains("are not positive definite or not finite"), Error);
  bent.data<double>()[49] = std::nan("");
  CHECK_THROWS_WITH_AS(codes_of(p.w, p.grid, spec, bent),
                       doctest::Contains("gptq: input 1 is not finite"), Error);
  CHECK_THROWS_WITH_AS(codes_of(p.w, p.grid, spec, {}),
                       doctest::Contains("gptq: a matrix of 48 columns wants the products"), Error);
  for (const double damping : {0.0, -1.0, 2.0, std::nan("")})
    CHECK_THROWS_WITH_AS(round_gptq({.damping = damping}), doctest::Contains("gptq: damping"),
                         Error);
}

TEST_CASE("gptq: one or two threads, the same codes") {
  Rng rng(9);
  const GroupSpec spec{.bits = 3, .group_size = 64};
  const Problem p(rng, 50, 260, spec);
  const Tensor h = converted(p.hessian, DType::F32);
  const int before = num_threads();
  set_num_threads(1);
  const std::vector<int> one = codes_of(p.w, p.grid, spec, h);
  set_num_threads(2);
  CHECK(codes_of(p.w, p.grid, spec, h) == one);
  set_num_threads(before);
}

}  // namespace
}  // namespace omq::quant
