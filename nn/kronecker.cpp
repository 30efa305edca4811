// Two products over all rows at once; the left one between two transpositions.
#include "nn/kronecker.h"

#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq::nn {
namespace {

int64_t size(const Tensor& factor) { return factor.defined() ? factor.dim(0) : 0; }

}  // namespace

bool Kronecker::sizes_fit(int64_t left, int64_t right, int64_t n) {
  if (left > 0 && right > 0) return left * right == n;
  return left + right > 0 && n % (left + right) == 0;
}

int64_t Kronecker::operations(int64_t n) const { return 2 * n * (size(left) + size(right)); }

Tensor Kronecker::operator()(const Tensor& any) const {
  const int64_t n = any.dim(-1);
  check(sizes_fit(size(left), size(right), n),
        "kronecker: factors of {} and {} (0: none) for rows of {}", size(left), size(right), n);
  const int64_t n2 = right.defined() ? size(right) : n / size(left), n1 = n / n2;
  const ComputeScope exact(Compute::F32);
  Tensor x = to(any, left.defined() ? left.dtype() : right.dtype());
  if (right.defined()) x = matmul(reshape(x, {-1, n2}), right);
  if (left.defined()) {
    x = transpose(reshape(x, {-1, n1, n2}), 1, 2);
    x = matmul(reshape(x, {-1, n1}), left);
    x = transpose(reshape(x, {-1, n2, n1}), 1, 2);
  }
  return to(reshape(x, any.shape()), any.dtype());
}

bool Kronecker::same_as(const Kronecker& o) const {
  const auto same = [](const Tensor& a, const Tensor& b) {
    return a.defined() == b.defined() &&
           (!a.defined() || (a.raw() == b.raw() && a.shape() == b.shape()));
  };
  return same(left, o.left) && same(right, o.right);
}

void Kronecker::visit(const VisitFn& v) {
  if (left.defined()) v("left", left);
  if (right.defined()) v("right", right);
}

}  // namespace omq::nn
