// Softmax over the last dim.
#include "autograd/ops.h"

namespace omq {

Tensor softmax(const Tensor& x) {
  check(x.ndim() >= 1 && x.dim(-1) > 0, "softmax: x {} has no last dim to sum over", x.shape());
  const Tensor source = contiguous(x);
  Tensor y = empty_like(source);
  on(source).softmax(y, source);
  return record("softmax", y, {source}, [y = y.detach()](const Tensor& dy) -> Grads {
    Tensor dx = empty_like(y);
    on(y).softmax_vjp(dx, y, contiguous(dy));  // dx = y ⊙ (dy − Σ dy ⊙ y)
    return {dx};
  });
}

}  // namespace omq
