// Constructions, each from its definition.
#include "quant/orthogonal.h"

#include <bit>
#include <cmath>
#include <vector>

#include "tensor/error.h"

namespace omq::quant {
namespace {

using Matrix = std::vector<double>;  // row by row

Tensor square_matrix(const Matrix& m, int64_t n) { return Tensor::from<double>(m, {n, n}); }

bool is_prime(int64_t n) {
  if (n < 2) return false;
  for (int64_t d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

bool is_power_of_two(int64_t n) { return n > 0 && std::has_single_bit(static_cast<uint64_t>(n)); }

// Orders above 2 are multiples of 4; both primes are then odd and of the wanted residue mod 4, or
// not (Paley II).
bool paley_one(int64_t n) { return n % 4 == 0 && is_prime(n - 1); }
bool paley_two(int64_t n) { return n % 4 == 0 && (n / 2 - 1) % 4 == 1 && is_prime(n / 2 - 1); }

// χ(a) mod the prime q: 1 where a is a square, −1 where it is none, 0 at 0.
std::vector<double> quadratic_character(int64_t q) {
  std::vector<double> chi(static_cast<size_t>(q), -1);
  for (int64_t a = 1; a < q; ++a) chi[static_cast<size_t>(a * a % q)] = 1;
  chi[0] = 0;
  return chi;
}

// Paley's bordered matrix [q+1, q+1]: χ(i − j) inside, 1 above, χ(−1) on the left, 0 in the corner.
Matrix paley_core(int64_t q) {
  const std::vector<double> chi = quadratic_character(q);
  const int64_t n = q + 1;
  Matrix s(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const bool corner = i == 0 && j == 0;
      s[static_cast<size_t>(i * n + j)] = corner   ? 0
                                          : i == 0 ? 1
                                          : j == 0 ? chi[static_cast<size_t>(q - 1)]
                                                   : chi[static_cast<size_t>((i - j + q) % q)];
    }
  return s;
}

Matrix sylvester(int64_t n) {
  Matrix h(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      h[static_cast<size_t>(i * n + j)] = std::popcount(static_cast<uint64_t>(i & j)) % 2 ? -1 : 1;
  return h;
}

Matrix kronecker(const Matrix& a, int64_t na, const Matrix& b, int64_t nb) {
  const int64_t n = na * nb;
  Matrix c(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      c[static_cast<size_t>(i * n + j)] = a[static_cast<size_t>(i / nb * na + j / nb)] *
                                          b[static_cast<size_t>(i % nb * nb + j % nb)];
  return c;
}

Matrix identity(int64_t n) {
  Matrix m(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) m[static_cast<size_t>(i * n + i)] = 1;
  return m;
}

Matrix plus(Matrix a, const Matrix& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

Matrix hadamard_entries(int64_t n) {
  if (is_power_of_two(n)) return sylvester(n);
  if (paley_one(n)) return plus(identity(n), paley_core(n - 1));
  if (paley_two(n)) {
    const int64_t half = n / 2;
    return plus(kronecker(paley_core(half - 1), half, {1, 1, 1, -1}, 2),
                kronecker(identity(half), half, {1, -1, -1, -1}, 2));
  }
  return kronecker(sylvester(2), 2, hadamard_entries(n / 2), n / 2);
}

double dot(const double* a, const double* b, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += a[i] * b[i];
  return s;
}

int64_t power_of_two_in(int64_t n) { return n & -n; }

}  // namespace

bool hadamard_exists(int64_t n) {
  if (n < 1) return false;
  if (is_power_of_two(n) || paley_one(n) || paley_two(n)) return true;
  return n % 8 == 0 && hadamard_exists(n / 2);
}

Tensor hadamard(int64_t n) {
  check(hadamard_exists(n), "hadamard: none of order {} can be constructed here", n);
  return square_matrix(hadamard_entries(n), n);
}

Tensor random_orthogonal(int64_t n, const Philox& random) {
  Matrix q(static_cast<size_t>(n * n));
  for (size_t i = 0; i < q.size(); ++i) q[i] = random.normal(i);
  // Gram and Schmidt's procedure on rows, each pass of it twice, which is enough for F64.
  for (int64_t i = 0; i < n; ++i) {
    double* row = q.data() + i * n;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t j = 0; j < i; ++j) {
        const double* done = q.data() + j * n;
        const double along = dot(row, done, n);
        for (int64_t c = 0; c < n; ++c) row[c] -= along * done[c];
      }
    const double length = std::sqrt(dot(row, row, n));
    for (int64_t c = 0; c < n; ++c) row[c] /= length;
  }
  return square_matrix(q, n);
}

Tensor orthogonal_factor(int64_t n, const Philox& random) {
  check(n >= 1, "orthogonal matrix of order {}", n);
  const int64_t blocks = hadamard_exists(n) ? n : power_of_two_in(n), m = n / blocks;
  Matrix h = hadamard_entries(blocks);
  for (double& x : h) x /= std::sqrt(static_cast<double>(blocks));
  if (m == 1) return square_matrix(h, n);
  return square_matrix(kronecker(h, blocks, random_orthogonal(m, random).to_vector<double>(), m),
                       n);
}

FactorSizes factor_sizes(int64_t n) {
  check(n >= 2, "orthogonal transform of rows of {}", n);
  const auto work = [](const FactorSizes& s) {
    return (s.left > 1 ? s.left : 0) + (s.right > 1 ? s.right : 0);
  };
  FactorSizes any{0, n}, exact{0, 0};
  for (int64_t left = 1; n % left == 0; left *= 2) {
    const FactorSizes s{left, n / left};
    if (work(s) < work(any)) any = s;
    if (hadamard_exists(s.right) && (exact.right == 0 || work(s) < work(exact))) exact = s;
  }
  const FactorSizes& s = exact.right > 0 && work(exact) < 2 * work(any) ? exact : any;
  return {s.left > 1 ? s.left : 0, s.right > 1 ? s.right : 0};
}

nn::Kronecker orthogonal_kronecker(int64_t n, const Philox& random) {
  const FactorSizes s = factor_sizes(n);
  nn::Kronecker k;
  if (s.left > 0) k.left = orthogonal_factor(s.left, random);
  if (s.right > 0) k.right = orthogonal_factor(s.right, random);
  return k;
}

}  // namespace omq::quant
