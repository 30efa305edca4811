// Sums, means, and the ranges of groups.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {
namespace {

// dy [.., 1, ..] repeated over `shape` as a real tensor.
Tensor repeat(const Tensor& dy, const Shape& shape) {
  Strides strides = dy.strides();
  for (int i = 0; i < shape.n; ++i)
    if (dy.dim(i) == 1) strides[i] = 0;
  Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
  on(dy).copy(dx, dy.alias(shape, strides));
  return dx;
}

}  // namespace

Tensor sum_to(const Tensor& x, const Shape& shape) {
  check(shape.n == x.ndim(), "sum_to: {} to {}", x.shape(), shape);
  for (int i = 0; i < shape.n; ++i)
    check(shape[i] == x.dim(i) || shape[i] == 1, "sum_to: {} to {}", x.shape(), shape);
  Tensor y = Tensor::empty(shape, wide_dtype(x.dtype()), x.device());
  on(x).sum_to(y, x);
  return record("sum_to", y, {x},
                [from = x.shape()](const Tensor& dy) -> Grads { return {repeat(dy, from)}; });
}

Tensor sum(const Tensor& x) {
  Shape ones = x.shape();
  for (int i = 0; i < ones.n; ++i) ones[i] = 1;
  return reshape(sum_to(x, ones), {1});
}

Tensor mean(const Tensor& x) {
  check(x.numel() > 0, "mean: empty tensor");
  return sum(x) * (1.0 / static_cast<double>(x.numel()));
}

Range group_range(const Tensor& x, GroupSpec s) {
  check(x.ndim() == 2 && x.dim(1) > 0, "group_range: wants [rows, cols], got {}", x.shape());
  const Shape grid{x.dim(0), s.groups(x.dim(1))};
  Tensor hi = Tensor::empty(grid, wide_dtype(x.dtype()), x.device()), lo = empty_like(hi);
  on(x).group_range(hi, lo, x, s);
  if (!needs_grad(x)) return {hi, lo};
  // Two outputs, two records: each passes its own gradient, and their sum is taken by the sweep.
  const Tensor xd = x.detach(), h = hi.detach(), l = lo.detach();
  auto vjp = [xd, h, l, s](bool upper) -> Vjp {
    return [xd, h, l, s, upper](const Tensor& dy) -> Grads {
      Tensor dx = Tensor::empty(xd.shape(), h.dtype(), xd.device());
      const Tensor d = contiguous(dy);
      const Tensor none = Tensor::zeros(h.shape(), h.dtype(), h.device());
      on(xd).group_range_vjp(dx, xd, h, l, upper ? d : none, upper ? none : d, s);
      return {dx};
    };
  };
  return {record("group_range.hi", hi, {x}, vjp(true)),
          record("group_range.lo", lo, {x}, vjp(false))};
}

}  // namespace omq
