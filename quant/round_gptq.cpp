// GPTQ's column solver (spec weight-methods §10), in the form of one triangular factor.
//
// Reference form: U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU); for every column i
//   e = (w_i − ŵ_i) / U_ii,   W_{:,i:} −= e·U_{i,i:}.
// With H = R·Rᵀ, R upper triangular, U = R⁻¹, and the same codes come without any inverse:
//   ŵ_k = Q( w_k + Σ_{j<k} (w_j − ŵ_j)·R_jk / R_kk )
// (arXiv 2307.13304 shows the equality). So H is factorised from its last column upwards, and
// errors flow into later columns: from earlier blocks of kBlock columns by one matrix product,
// within a block column by column.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "autograd/ops.h"
#include "quant/rounder.h"
#include "tensor/numeric.h"
#include "tensor/parallel.h"

namespace omq::quant {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kRows = 16;  // of a matrix that one thread takes at a time

// Rows [r0, r1) and columns [c0, c1) of a matrix.
Tensor part(const Tensor& m, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  return slice(slice(m, 0, r0, r1), 1, c0, c1);
}

// Columns [k0, k1) of rows [first, last) of the matrix at m, n columns wide: from what is left of H
// there to R, in place, rows from the last to the first. Rows of the diagonal block [k0, k1) itself
// come first, since all others are solved with them. False when a pivot is not positive.
template <class T>
bool solve_rows(T* m, int64_t n, int64_t k0, int64_t k1, int64_t first, int64_t last) {
  for (int64_t i = last - 1; i >= first; --i) {
    T* const row = m + i * n;
    for (int64_t c = k1 - 1; c >= std::max(k0, i); --c) {
      const T* const other = m + c * n;
      double sum = static_cast<double>(row[c]);
      for (int64_t k = c + 1; k < k1; ++k)
        sum -= static_cast<double>(row[k]) * static_cast<double>(other[k]);
      if (c == i) {
        if (!(sum > 0) || !std::isfinite(sum)) return false;
        row[c] = static_cast<T>(std::sqrt(sum));
      } else {
        row[c] = static_cast<T>(sum / static_cast<double>(other[c]));
      }
    }
  }
  return true;
}

// H [n, n] → R in its upper triangle, H = R·Rᵀ; what is below the diagonal is left over. False when
// H is not positive definite.
template <class T> bool factorise(Tensor& h) {
  const int64_t n = h.dim(0);
  T* const m = h.data<T>();
  for (int64_t k1 = n; k1 > 0; k1 -= std::min(k1, kBlock)) {
    const int64_t k0 = k1 - std::min(k1, kBlock);
    if (k1 < n) {
      Tensor column = part(h, 0, k1, k0, k1);
      const Tensor done = matmul(part(h, 0, k1, k1, n), transpose(part(h, k0, k1, k1, n), 0, 1));
      on(column).copy(column, column - done);
    }
    if (!solve_rows(m, n, k0, k1, k0, k1)) return false;
    parallel_for(k0, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) solve_rows(m, n, k0, k1, i, i + 1);
    });
  }
  return true;
}

// H with its columns in the order of the solution, the damped diagonal of dead columns set to 1.
template <class T>
Tensor prepared(const Tensor& hessian, const std::vector<int64_t>& order, double damping) {
  const int64_t n = hessian.dim(0);
  Tensor h = Tensor::empty({n, n}, hessian.dtype());
  const T* const from = hessian.data<T>();
  T* const to = h.data<T>();
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(from[i * n + i]);
  const double added = damping * total / static_cast<double>(n);
  parallel_for(n, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const row = from + order[static_cast<size_t>(i)] * n;
      for (int64_t j = 0; j < n; ++j) to[i * n + j] = row[order[static_cast<size_t>(j)]];
      T& d = to[i * n + i];
      d = d > T(0) ? static_cast<T>(static_cast<double>(d) + added) : T(1);
    }
  });
  return h;
}

template <class T> class Solver {
 public:
  Solver(const Tensor& w, const Grid& grid, GroupSpec spec, std::vector<int64_t> order)
      : w_(w), grid_(grid), spec_(spec), order_(std::move(order)) {
    codes_ = Tensor::empty(w.shape(), DType::U8);
    errors_ = Tensor::zeros(w.shape(), std::is_same_v<T, double> ? DType::F64 : DType::F32);
  }

  // r: R of the columns in their order.
  Tensor solve(Tensor r) {
    const int64_t n = r.dim(0);
    T* const m = r.data<T>();
    parallel_for(n, kRows, [&](int64_t begin, int64_t end) {  // R_jk → R_jk / R_kk
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = j + 1; k < n; ++k) m[j * n + k] /= m[k * n + k];
    });
    for (int64_t a = 0; a < n; a += kBlock) {
      const int64_t b = std::min(n, a + kBlock);
      const Tensor inflow = a > 0 ? matmul(slice(errors_, 1, 0, a), part(r, 0, a, a, b)) : Tensor{};
      parallel_for(w_.dim(0), kRows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          solve_row(row, a, b, m, inflow.defined() ? inflow.data<T>() + row * (b - a) : nullptr);
      });
    }
    return codes_;
  }

 private:
  // Columns [a, b) of one row. inflow [b − a]: from the errors of columns before a.
  void solve_row(int64_t row, int64_t a, int64_t b, const T* r, const T* inflow) {
    const int64_t n = w_.dim(1), groups = spec_.groups(n), width = spec_.group_cols(n);
    const float* const w = w_.data<float>() + row * n;
    const float* const h = grid_.scale.data<float>() + row * groups;
    const float* const z = grid_.zero.data<float>() + row * groups;
    const T top = static_cast<T>(spec_.max_code());
    T wanted[kBlock];
    for (int64_t k = a; k < b; ++k)
      wanted[k - a] =
          static_cast<T>(w[order_[static_cast<size_t>(k)]]) + (inflow ? inflow[k - a] : T(0));
    for (int64_t k = a; k < b; ++k) {
      const int64_t column = order_[static_cast<size_t>(k)], g = column / width;
      const T step = static_cast<T>(h[g]), zero = static_cast<T>(z[g]);
      const T code = std::clamp(round_even(wanted[k - a] / step) + zero, T(0), top);
      codes_.data<uint8_t>()[row * n + column] = static_cast<uint8_t>(code);
      const T error = static_cast<T>(w[column]) - (code - zero) * step;
      errors_.data<T>()[row * n + k] = error;
      const T* const flow = r + k * n;
      for (int64_t j = k + 1; j < b; ++j) wanted[j - a] += error * flow[j];
    }
  }

  const Tensor& w_;
  const Grid& grid_;
  GroupSpec spec_;
  std::vector<int64_t> order_;
  Tensor codes_, errors_;  // codes in the order of w, W − Ŵ in that of the solution
};

struct Gptq final : Rounder {
  explicit Gptq(GptqOptions o) : options(o) {}
  GptqOptions options;

  bool wants_hessian() const override { return true; }

  Tensor codes(const Tensor& any, const Grid& grid, GroupSpec spec,
               const Tensor& hessian) const override {
    NoGrad off;
    const int64_t n = any.dim(1);
    check(hessian.defined() && hessian.shape() == Shape{n, n},
          "gptq: a matrix of {} columns wants the products of their inputs, [{}, {}]", n, n, n);
    const Grid g{contiguous(grid.scale.detach()), contiguous(grid.zero.detach())};
    const Tensor w = contiguous(any.detach());
    return hessian.dtype() == DType::F64 ? solve<double>(w, g, spec, hessian)
                                         : solve<float>(w, g, spec, hessian);
  }

  template <class T>
  Tensor solve(const Tensor& w, const Grid& grid, GroupSpec spec, const Tensor& hessian) const {
    const Tensor h = contiguous(hessian);
    const std::vector<int64_t> order = order_of(h.data<T>(), h.dim(0));
    for (double damping = options.damping; damping < 1.001; damping *= 10) {
      Tensor r = prepared<T>(h, order, damping);
      if (factorise<T>(r)) return Solver<T>(w, grid, spec, order).solve(r);
    }
    fail("gptq: the products of the inputs, Xᵀ·X, are not positive definite or not finite");
  }

  template <class T> std::vector<int64_t> order_of(const T* h, int64_t n) const {
    std::vector<int64_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), int64_t{0});
    for (int64_t i = 0; i < n; ++i)
      check(std::isfinite(h[i * n + i]), "gptq: input {} is not finite", i);
    if (options.act_order)
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return h[a * n + a] > h[b * n + b]; });
    return order;
  }
};

}  // namespace

std::shared_ptr<const Rounder> round_gptq(GptqOptions options) {
  check(options.damping > 0 && options.damping <= 1, "gptq: damping {}: above 0, at most 1",
        options.damping);
  return std::make_shared<const Gptq>(options);
}

}  // namespace omq::quant
