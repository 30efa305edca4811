// Rotary position embedding in the half-split form of Hugging Face: channels i and i + d/2 are one
// pair.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  check(x.ndim() == 4 && x.dim(3) % 2 == 0, "rope: wants [B,T,H,d] with even d, got {}", x.shape());
  check(cos.ndim() == 2 && cos.dim(1) * 2 == x.dim(3) && cos.shape() == sin.shape(),
        "rope: tables {} and {} for x {}", cos.shape(), sin.shape(), x.shape());
  check(positions.ndim() == 1 && positions.dim(0) == x.dim(1) && positions.dtype() == DType::I32,
        "rope: positions {} {} for {} tokens", dtype_name(positions.dtype()), positions.shape(),
        x.dim(1));
  const Tensor source = contiguous(x);
  const DType type = product_dtype(source);
  Tensor y = Tensor::empty(source.shape(), type, source.device());
  const Tensor c = contiguous(cos.detach()), s = contiguous(sin.detach()),
               at = contiguous(positions);
  on(source).rope(y, source, c, s, at, false);
  return record("rope", y, {source}, [c, s, at, type](const Tensor& dy) -> Grads {
    const Tensor d = contiguous(dy);
    Tensor dx = Tensor::empty(d.shape(), type, d.device());
    on(d).rope(dx, d, c, s, at, true);  // a rotation's gradient is the rotation back
    return {dx};
  });
}

}  // namespace omq
