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

Tensor mse(const Tensor& a, const Tensor& b) {
  check(a.shape() == b.shape(), "mse: shapes {} and {} differ", a.shape(), b.shape());
  return mean(square(sub(a, b)));
}

}  // namespace omq
