// The gated activation of SwiGLU: silu(gate) ⊙ up, fused so that silu(gate) is never stored.
#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq {

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  check(gate.shape() == up.shape(), "silu_mul: gate {} and up {} differ", gate.shape(), up.shape());
  const Tensor g = contiguous(gate), u = contiguous(up);
  const DType type = product_dtype(g);
  Tensor y = Tensor::empty(g.shape(), type, g.device());
  on(g).silu_mul(y, g, u);
  return record("silu_mul", y, {g, u},
                [g = g.detach(), u = u.detach(), type](const Tensor& dy) -> Grads {
                  Tensor dg = Tensor::empty(g.shape(), type, g.device()), du = empty_like(dg);
                  on(g).silu_mul_vjp(dg, du, g, u, contiguous(dy));
                  return {dg, du};
                });
}

}  // namespace omq
