// Losses: token cross-entropy, and the mean squared error of two block outputs (Eq. 1's norm).
#include "autograd/ops.h"

namespace omq {

Tensor cross_entropy(const Tensor& logits, const Tensor& targets) {
  check(logits.ndim() == 2 && targets.ndim() == 1 && targets.dim(0) == logits.dim(0) &&
            targets.dtype() == DType::I32,
        "cross_entropy: logits {} and targets {} {}", logits.shape(), dtype_name(targets.dtype()),
        targets.shape());
  check(logits.dim(1) > 0, "cross_entropy: logits {} have no classes", logits.shape());
  const Tensor x = contiguous(logits), ids = contiguous(targets);
  Tensor loss = Tensor::empty({x.dim(0)}, x.dtype(), x.device()), lse = empty_like(loss);
  on(x).cross_entropy(loss, lse, x, ids);
  return record("cross_entropy", loss, {x}, [x = x.detach(), lse, ids](const Tensor& dy) -> Grads {
    Tensor dx = empty_like(x);
    on(x).cross_entropy_vjp(dx, x, lse, ids, contiguous(dy));
    return {dx};
  });
}

Tensor mse_composed(const Tensor& a, const Tensor& b) { return mean(square(sub(a, b))); }

Tensor mse(const Tensor& a, const Tensor& b) {
  check(a.shape() == b.shape(), "mse: shapes {} and {} differ", a.shape(), b.shape());
  check(a.numel() > 0, "mse: empty tensors");
  check(a.dtype() == b.dtype(), "mse: dtypes differ: {} and {}", dtype_name(a.dtype()),
        dtype_name(b.dtype()));
  const Tensor x = contiguous(a), y = contiguous(b);
  Tensor loss = Tensor::empty({1}, x.dtype(), x.device());
  on(x).mse(loss, x, y);
  const bool need_a = needs_grad(a), need_b = needs_grad(b);
  return record("mse", loss, {x, y},
                [a = x.detach(), b = y.detach(), need_a, need_b](const Tensor& dloss) -> Grads {
                  Tensor da, db;
                  if (need_a) da = empty_like(a);
                  if (need_b) db = empty_like(b);
                  on(a).mse_vjp(da, db, a, b, contiguous(dloss));
                  return {da, db};
                });
}

}  // namespace omq
