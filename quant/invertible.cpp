// See invertible.h.
#include "quant/invertible.h"

#include <vector>

#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq::quant {
namespace {

// 1 where keep(row, column), else 0.
template <class F> Tensor mask(int64_t n, const Tensor& like, F&& keep) {
  std::vector<double> m(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n * n; ++i) m[static_cast<size_t>(i)] = keep(i / n, i % n);
  return to(to(Tensor::from<double>(m, {n, n}), like.dtype()), like.device());
}

Tensor turned(const Tensor& x) { return transpose(x, x.ndim() - 2, x.ndim() - 1); }

}  // namespace

Invertible::Invertible(const Tensor& q, int64_t count)
    : q_(q),
      lower_(mask(q.dim(0), q, [](int64_t r, int64_t c) { return c < r; })),
      upper_(mask(q.dim(0), q, [](int64_t r, int64_t c) { return c > r; })),
      diagonal_(mask(q.dim(0), q, [](int64_t r, int64_t c) { return c == r; })) {
  const int64_t n = q.dim(0);
  const Shape shape = count > 0 ? Shape{count, n, n} : Shape{n, n};
  if (count > 0) q_ = contiguous(expand(reshape(q, {1, n, n}), shape));
  e_ = parameter(Tensor::zeros(shape, q.dtype(), q.device()));
}

Invertible::Pair Invertible::operator()() const {
  const ComputeScope exact(Compute::F32);
  const Tensor below = e_ * lower_, above = e_ * upper_;
  Shape row = e_.shape();
  row[row.n - 2] = 1;
  const Tensor d = sum_to(e_ * diagonal_, row);  // entry c for column c
  // Column by column: (Q·(I + E₋))·diag, then times I + E₊; and (Q·(I + E₋)⁻ᵀ)·diag⁻¹ likewise.
  const Tensor left = (q_ + matmul(q_, below)) * exp(d);
  const Tensor back = matmul(q_, turned(unit_triangular_inverse(below))) * exp(-d);
  return {left + matmul(left, above), matmul(back, turned(unit_triangular_inverse(above)))};
}

}  // namespace omq::quant
